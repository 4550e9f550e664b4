"""Sparsemax: the projection of the scores onto the simplex, with exact zeros.

    w_j = relu(s_j - tau),    tau such that sum_j w_j = 1

Rows sum to one and most weights are exactly 0.
Source: Martins and Astudillo, 2016, arXiv:1602.02068.
"""

import torch

from attnvariants.context import readable
from attnvariants.registry import Variant
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import Hooks, no_sweep

# Above this share of candidates, sweeping the dense rows is cheaper than gathering them.
_DENSE_SHARE = 0.2
# Keys this little above tau, relative to its distance from the row maximum, are at it: rounding
# must not move ties in and out of the support. The backward's tau is higher by as much.
_TIE = tl.constexpr(2.0**-22)


@torch.no_grad()
def threshold(z):
    """tau of each row of z, whose maximum is 0: Newton's method from -1 upwards, which is exact.

    The support only shrinks, so it is found when its size stays. Keys at or below -1 are never in
    it; where few are above, they are gathered once and the dense rows are not read again.
    """
    if not readable(z):
        return threshold_by_sorting(z)
    flat = z.reshape(-1, z.shape[-1])
    tau = flat.new_full(flat.shape[:1], -1.0)
    row, column = (flat > -1).nonzero(as_tuple=True)
    if row.numel() > _DENSE_SHARE * flat.numel():
        candidates = flat.clamp(min=-1)

        def spread(rows):
            return rows.unsqueeze(-1)

        def fold(part):
            return part.sum(-1)
    else:
        candidates = flat[row, column]

        def spread(rows):
            return rows[row]

        def fold(part):
            return torch.zeros_like(tau).index_add_(0, row, part)

    size = torch.full_like(tau, torch.inf)
    while True:
        inside = (candidates > spread(tau)).to(z.dtype)
        found = fold(inside)
        # rounding can let a key at tau leave and come back; only rows that shrink may move
        shrunk = found < size
        if not bool(shrunk.any()):
            return tau.view(*z.shape[:-1], 1)
        tau = torch.where(shrunk, (fold(candidates * inside) - 1) / found, tau)
        size = torch.where(shrunk, found, size)


def threshold_by_sorting(z):
    """As `threshold`, without a look at the values."""
    falling = z.clamp(min=-1).sort(-1, descending=True).values
    sums = falling.cumsum(-1)
    count = torch.ones_like(falling).cumsum(-1)
    inside = (1 + count * falling > sums).to(z.dtype)
    # the support is where the condition holds, which is at the front
    return ((falling * inside).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)


def ratio(scores, rows):
    z = scores - scores.amax(-1, keepdim=True).detach()
    inside = (z > threshold(z)).to(z.dtype)
    # One Newton step at the solution: the same tau, and its exact gradient. Keys at -inf, whose
    # product with 0 would be NaN, are outside wherever -1 is.
    total = (z.clamp(min=-1) * inside).sum(-1, keepdim=True)
    return (z - (total - 1) / inside.sum(-1, keepdim=True)).relu(), None


def fused(scores, rows):
    if scores.requires_grad:
        return ratio(scores, rows)
    z = scores.sub_(scores.amax(-1, keepdim=True))
    return z.sub_(threshold(z)).relu_(), None


@jit
def start(BLOCK_M: tl.constexpr):
    """Sum of the weights and size of the support; before them come the maximum and tau less it."""
    return tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    m, tau, total, size = stats
    w = tl.maximum((x - m[:, None]) * unit - tau[:, None], 0.0)
    size += tl.sum((w > tau[:, None] * -_TIE).to(tl.float32), 1)
    return (m, tau, total + tl.sum(w, 1), size), w, m


@jit
def finish(stats, unit, n, theta):
    """What rounding left of the sum's distance from 1 is taken off: by another step of Newton's."""
    m, tau, total, size = stats
    some = size > 0
    # tau is NaN where a score was
    total = tl.where(some, total, 1.0) + tau * 0.0
    size = 1.0 / tl.maximum(size, 1.0)
    return 1.0 / total, (m, (tau + (total - 1.0) * size) * (1.0 - _TIE), size)


@jit
def delta(x, unit, cols, dp, saved, delta0, n, theta):
    w = (x - saved[0]) * unit - saved[1]
    return tl.where(w > 0, dp * saved[2], 0.0)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    w = tl.maximum((x - saved[0]) * unit - saved[1], 0.0)
    return w, tl.where(w > 0, dp - delta[1], 0.0)


HOOKS = Hooks(
    start, no_sweep, fold, finish, grad, delta,
    saves=4, rescales=False, delta_sweep=True, hides=True, listed=True, cost=2,
)  # fmt: skip

VARIANT = Variant(doc=__doc__, ratio=ratio, fused=fused, row_sum="one", hooks=HOOKS)
