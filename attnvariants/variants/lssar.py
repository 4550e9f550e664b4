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
from attnvariants.variants._shared import (
    LOG2E,
    is_bounded,
    scaled_cosine,
    softplus_fused,
    softplus_ratio,
)  # fmt: skip
from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import Hooks, inverse, log_sum

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
    e = (p * (log_r - peak.masked_fill(peak == -math.inf, 0.0))).exp()
    return e, e.sum(-1, keepdim=True)


def fused(scores, rows, *, p, offset, exempt_rows):
    if p < 1 or p > 64 or p != int(p):
        return ratio(scores / LOG2E, rows, p=p, offset=offset, exempt_rows=exempt_rows)
    weight, total = softplus_fused(scores)
    # a number times a bool tensor would be rounded to float32
    lowered = offset * (rows.visible > exempt_rows).to(weight.dtype)
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


@jit
def start(BLOCK_M: tl.constexpr):
    zero = tl.zeros([BLOCK_M], tl.float32)
    return tl.full([BLOCK_M], fn.LOWEST, tl.float32), zero, zero, zero


@jit
def sweep(stats, x, unit, keep, cols, n, theta, index):
    m, total, peak, mass = stats
    c = unit * fn.LOG2E
    pivot = tl.minimum(tl.maximum(m, tl.max(x, 1)), 0.0)
    total = total * tl.exp2((m - pivot) * c) + tl.sum(pivoted(x, pivot[:, None], c), 1)
    return pivot, total, peak, mass


@jit
def pivoted(x, pivot, c):
    return fn.softplus2(x * c, pivot * c, (x - pivot) * c)


@jit
def raise_above(x, pivot, c, share, n, theta):
    """relu(n a - o), 0 where the key does not stand out.

    The share is 1 / sum, the sum that of the pivoted weights: its logarithm would be too coarse
    for the power.
    """
    raised = pivoted(x, pivot, c) * share * n - tl.where(n <= theta[2], 0.0, theta[1])
    return tl.where(raised <= theta[3], 0.0, raised)


@jit
def power(ratio, p):
    # near 1, where the weight is, the logarithm is small and so is its rounding
    return tl.exp2(p * tl.log2(ratio))


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    m, total, peak, mass = stats
    r = raise_above(x, m[:, None], unit * fn.LOG2E, inverse(total)[:, None], n[:, None], theta)
    higher = tl.maximum(peak, tl.max(r, 1))
    e = power(r * inverse(higher)[:, None], theta[0])
    rescale = power(peak * inverse(higher), theta[0])
    return (m, total, higher, mass * rescale + tl.sum(e, 1)), e, rescale


@jit
def finish(stats, unit, n, theta):
    m, total, peak, mass = stats
    factor = inverse(mass)
    return factor, (m, inverse(total), inverse(peak), factor)


@jit
def sharpened(x, c, dp, saved, delta0, n, theta):
    """Weights, and the gradient of n a."""
    r = raise_above(x, saved[0], c, saved[1], n, theta)
    w = power(r * saved[2], theta[0]) * saved[3]
    return w, theta[0] * w / tl.where(r > 0, r, 1.0) * (dp - delta0)


@jit
def delta(x, unit, cols, dp, saved, delta0, n, theta):
    c = unit * fn.LOG2E
    g = sharpened(x, c, dp, saved, delta0, n, theta)[1]
    return g * pivoted(x, saved[0], c) * saved[1]


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    c = unit * fn.LOG2E
    w, g = sharpened(x, c, dp, saved, delta[0], n, theta)
    slope = fn.sigmoid2(x * c, saved[0] * c, (x - saved[0]) * c)
    return w, slope * (fn.LOG2E * n * saved[1]) * (g - delta[1])


@jit
def start_bounded(BLOCK_M: tl.constexpr):
    zero = tl.zeros([BLOCK_M], tl.float32)
    return zero, tl.full([BLOCK_M], fn.LOWEST, tl.float32), zero


@jit
def sweep_bounded(stats, x, unit, keep, cols, n, theta, index):
    total, peak, mass = stats
    return total + tl.sum(fn.softplus2_half(x * (unit * fn.LOG2E)), 1), peak, mass


@jit
def log_raised_bounded(w, rate, offset, least):
    raised = w * rate - offset
    dead = raised <= least
    return tl.where(dead, float("-inf"), fn.log2_approx(raised))


@jit
def fold_bounded(stats, x, unit, keep, cols, n, theta):
    total, peak, mass = stats
    w = fn.softplus2_half(x * (unit * fn.LOG2E))
    rate = (n * inverse(total))[:, None]
    offset = tl.where(n <= theta[2], 0.0, theta[1])[:, None]
    log_r = log_raised_bounded(w, rate, offset, theta[3])
    higher = tl.maximum(peak, tl.max(log_r, 1) * theta[0])
    e = tl.exp2(log_r * theta[0] - higher[:, None])
    rescale = tl.exp2(peak - higher)
    return (total, higher, mass * rescale + tl.sum(e, 1)), e, rescale


@jit
def finish_bounded(stats, unit, n, theta):
    total, peak, mass = stats
    log_mass = log_sum(peak, mass)
    # as many rows as `finish` saves, whichever of the two a call takes
    return inverse(mass), (total * 0.0, inverse(total), log_mass, log_mass)


@jit
def sharpened_bounded(a, dp, saved, delta0, n, theta):
    offset = tl.where(n <= theta[2], 0.0, theta[1])
    log_r = log_raised_bounded(a, saved[1] * n, offset, theta[3])
    w = tl.exp2(log_r * theta[0] - saved[2])
    # w / r, and 0 where log r is -inf
    slope = tl.exp2(log_r * (theta[0] - 1.0) - saved[2])
    return w, slope * (theta[0] * (dp - delta0))


@jit
def delta_bounded(x, unit, cols, dp, saved, delta0, n, theta):
    a = fn.softplus2_half(x * (unit * fn.LOG2E))
    return sharpened_bounded(a, dp, saved, delta0, n, theta)[1] * (a * saved[1])


@jit
def grad_bounded(x, unit, cols, dp, saved, delta, n, theta):
    z = x * (unit * fn.LOG2E)
    a = fn.softplus2_half(z)
    w, g = sharpened_bounded(a, dp, saved, delta[0], n, theta)
    return w, tl.exp2(z - a) * (fn.LOG2E * n * saved[1]) * (g - delta[1])


HOOKS = Hooks(
    start, sweep, fold, finish, grad, delta,
    saves=4, sweeps=1, needs_n=True, delta_sweep=True, hides=True, cost=2,
)  # fmt: skip
BOUNDED = Hooks(
    start_bounded, sweep_bounded, fold_bounded, finish_bounded, grad_bounded, delta_bounded,
    saves=4, sweeps=1, needs_n=True, delta_sweep=True, hides=True, cost=2,
)  # fmt: skip


def hooks(options, case):
    # w / r is a power p - 1, which p > 1 keeps finite
    return BOUNDED if is_bounded(case) and options["p"] > 1 else HOOKS


def theta(options, case):
    offset = float(options["offset"])
    limits = torch.finfo(torch.float32)
    least = max(_TIES * limits.eps * offset, limits.tiny)
    return float(options["p"]), offset, float(options["exempt_rows"]), least


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    prepare=scaled_cosine,
    scale=1.0,
    row_sum="at most one",
    hooks=hooks,
    theta=theta,
    options={
        "p": Option(15.0, "power of the re-weighting (3 is best at the trained length)", above=0.0),
        "offset": Option(1.0, "what a key must exceed, in units of the row's mean", minimum=0.0),
        "exempt_rows": Option(3, "rows that see at most so many keys have offset 0", minimum=0),
    },
)
