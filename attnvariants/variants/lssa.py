"""LSSA: softplus attention on cosine scores whose scale follows the number of visible keys.

    w_j = softplus(x_j) / sum_k softplus(x_k),    x_j = log d log n cos(q, k_j)

d is the head dimension, n the number of keys that the row sees; there is no 1/sqrt(d). `scale`
multiplies x (default 1); softcap, ALiBi and bias act on x. Rows sum to one.
Source: Gao et al., 2025, arXiv:2501.13428 (version 5).
"""

from attnvariants.registry import Variant
from attnvariants.variants._shared import (
    LOG2E,
    is_bounded,
    scaled_cosine,
    softplus_fused,
    softplus_ratio,
)  # fmt: skip
from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import (
    Hooks,
    inverse,
    no_delta,
    no_stats,
    no_sweep,
    peak_and_sum,
    pivot_and_share,
)


def ratio(scores, rows):
    return softplus_ratio(scores)


def fused(scores, rows):
    return softplus_fused(scores)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    m, l = stats
    c = unit * fn.LOG2E
    # only rows whose scores are all negative need a pivot
    peak = tl.minimum(tl.maximum(m, tl.max(x, 1)), 0.0)
    w = fn.softplus2(x * c, peak[:, None] * c, (x - peak[:, None]) * c)
    rescale = tl.exp2((m - peak) * c)
    return (peak, l * rescale + tl.sum(w, 1)), w, rescale


@jit
def finish(stats, unit, n, theta):
    return inverse(stats[1]), pivot_and_share(stats)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    c = unit * fn.LOG2E
    past = (x - saved[0]) * c
    w = fn.softplus2(x * c, saved[0] * c, past) * saved[1]
    slope = fn.sigmoid2(x * c, saved[0] * c, past) * (fn.LOG2E * saved[1])
    return w, slope * (dp - delta[0])


@jit
def fold_bounded(stats, x, unit, keep, cols, n, theta):
    z = x * (unit * fn.LOG2E)
    w = fn.softplus2_half(z)
    return (stats[0] + tl.sum(w, 1),), w, 1.0


@jit
def finish_bounded(stats, unit, n, theta):
    factor = inverse(stats[0])
    # as many rows as `finish` saves, whichever of the two a call takes
    return factor, (factor, factor)


@jit
def grad_bounded(x, unit, cols, dp, saved, delta, n, theta):
    z = x * (unit * fn.LOG2E)
    w = fn.softplus2_half(z)
    # e^x / (1 + e^x) without a division
    slope = tl.exp2(z - w)
    return w * saved[0], slope * (saved[0] * fn.LOG2E) * (dp - delta[0])


HOOKS = Hooks(
    peak_and_sum, no_sweep, fold, finish, grad, no_delta,
    saves=2, hides=True, scaled=True, cost=1,
)  # fmt: skip
BOUNDED = Hooks(
    no_stats, no_sweep, fold_bounded, finish_bounded, grad_bounded, no_delta,
    saves=2, rescales=False, hides=True, cost=1,
)  # fmt: skip


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    prepare=scaled_cosine,
    scale=1.0,
    row_sum="one",
    hooks=lambda options, case: BOUNDED if is_bounded(case) else HOOKS,
)
