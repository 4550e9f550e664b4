"""LSSAR: LSSA sharpened by keeping only the keys that stand out of their row, to a power p.

    w_j = r_j^p / sum_k r_k^p,    r_j = relu(n a_j - o),    a = LSSA weights of the row

o is `offset`, or 0 for rows with n <= `exempt_rows`. The power is taken in the log domain without
any eps, so p = 15 neither underflows nor overflows. A row in which no key stands out, by more than
16 units of rounding, gets no weight; the others sum to one.
Source: Gao et al., 2025, arXiv:2501.13428 (version 5).
"""

import math

import torch
import torch.nn.functional as F

from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E, scaled_cosine, softplus_fused, softplus_ratio

# Keys this many units of rounding above the offset are at it: rows of ties stay empty.
_TIES = 16


def ratio(scores, rows, *, p, offset, exempt_rows):
    weight, total = softplus_ratio(scores)
    u = weight * (rows.visible / total)
    raised = torch.where(rows.visible <= exempt_rows, u, u - offset)
    # near 0 the power is 0 as well, but its derivative would divide by what underflows
    limits = torch.finfo(u.dtype)
    dead = raised <= max(_TIES * limits.eps * offset, limits.tiny)
    log_r = torch.where(dead, 1.0, raised).log().masked_fill(dead, -math.inf)
    peak = log_r.amax(-1, keepdim=True).detach()
    e = (p * (log_r - peak.masked_fill(peak.isneginf(), 0.0))).exp()
    return e, e.sum(-1, keepdim=True)


def fused(scores, rows, *, p, offset, exempt_rows):
    if p < 1 or p > 64 or p != int(p):
        return ratio(scores / LOG2E, rows, p=p, offset=offset, exempt_rows=exempt_rows)
    weight, total = softplus_fused(scores)
    lowered = offset * (rows.visible > exempt_rows)
    r = weight * (rows.visible / total) - lowered
    r = F.threshold(r, _TIES * torch.finfo(r.dtype).eps * offset, 0.0)
    # divided by its maximum r^p cannot overflow, and whole powers need no logarithm
    peak = r.amax(-1, keepdim=True).detach()
    power = whole_power(r / torch.where(peak == 0, 1.0, peak), int(p))
    return power, power.sum(-1, keepdim=True)


def whole_power(x, p):
    """x^p by squaring, for a whole p >= 1."""
    result = None
    while p:
        if p % 2:
            result = x if result is None else result * x
        p //= 2
        x = x * x if p else x
    return result


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    prepare=scaled_cosine,
    scale=1.0,
    row_sum="at most one",
    options={
        "p": Option(15.0, "power of the re-weighting (3 is best at the trained length)", above=0.0),
        "offset": Option(1.0, "what a key must exceed, in units of the row's mean", minimum=0.0),
        "exempt_rows": Option(3, "rows that see at most so many keys have offset 0", minimum=0),
    },
)
