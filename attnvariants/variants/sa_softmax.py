"""Self-Adjust Softmax: the softmax times its own scores.

    w_j = y_j softmax(s)_j
    form "x":        y_j = s_j
    form "minmax0":  y_j = (s_j - a) / (b - a + 1e-10)
                     a = min(min_k s_k, 0),    b = max(max_k s_k, 0)

min and max run over the visible keys. With form "x" weights may be negative; with "minmax0" they
lie in [0, 1] and a row sums to at most one; a row whose scores are all 0 gets no weight and no
gradient.
The gradient flows through min and max unless `detach_minmax`; where several keys share one, the
engines in torch divide it among them and the kernels give it to the first.
Source: Zheng et al., 2025, arXiv:2502.18277.
"""

import math

import torch

from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E, exp_fused, exp_ratio
from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import (
    Hooks,
    far,
    finish_exp,
    finish_exp_fast,
    fold_exp,
    fold_exp_fast,
    inverse,
    no_delta,
    no_sweep,
    normalised,
    normalised_fast,
    peak_and_sum,
    pivot_and_share,
    power_of_two,
)  # fmt: skip

# the authors' constant, kept so that trained models carry over
_EPS = 1e-10


def ratio(scores, rows, *, form, detach_minmax):
    e, total = exp_ratio(scores)
    # a hidden key's score is -inf and its weight 0: keep their product out of NaN
    hidden = scores == -math.inf
    x = scores.masked_fill(hidden, 0.0)
    if form == "x":
        return x * e, total
    source = scores.detach() if detach_minmax else scores
    # nor may it share the gradient of a minimum or maximum that happens to be 0
    low = source.masked_fill(hidden, math.inf).amin(-1, keepdim=True).clamp(max=0)
    high = source.amax(-1, keepdim=True).clamp(min=0)
    width = high - low
    alive = (width > 0) / (width + _EPS)
    return (x - low) * e * alive, total


def fused(scores, rows, *, form, detach_minmax):
    if form != "x":
        return ratio(scores / LOG2E, rows, form=form, detach_minmax=detach_minmax)
    x = scores.clamp(min=torch.finfo(scores.dtype).min)
    e, total = exp_fused(scores)
    return (x * e if scores.requires_grad else x.mul_(e)), total * LOG2E


@jit
def fold_x(stats, x, unit, keep, cols, n, theta):
    stats, e, rescale = fold_exp(stats, x, unit, keep, cols, n, theta)
    return stats, x * e, rescale


@jit
def fold_x_fast(stats, x, unit, keep, cols, n, theta):
    stats, e, rescale = fold_exp_fast(stats, x, unit, keep, cols, n, theta)
    return stats, x * e, rescale


@jit
def finish_x(stats, unit, n, theta):
    factor, saved = finish_exp(stats, unit, n, theta)
    return factor * unit, saved


@jit
def finish_x_fast(stats, unit, n, theta):
    factor, saved = finish_exp_fast(stats, unit, n, theta)
    return factor * unit, saved


@jit
def slope_x(p, x, unit, dp, delta):
    w = p * (x * unit)
    return w, w * dp + p * (dp - delta[0])


@jit
def grad_x(x, unit, cols, dp, saved, delta, n, theta):
    return slope_x(normalised(x, unit, saved), x, unit, dp, delta)


@jit
def grad_x_fast(x, unit, cols, dp, saved, delta, n, theta):
    return slope_x(tl.minimum(normalised_fast(x, unit, saved), 1.0), x, unit, dp, delta)


@jit
def start(BLOCK_M: tl.constexpr):
    zero = tl.zeros([BLOCK_M], tl.float32)
    nowhere = tl.full([BLOCK_M], -1, tl.int32)
    return tl.full([BLOCK_M], fn.LOWEST, tl.float32), zero, zero, zero, nowhere, nowhere


@jit
def sweep(stats, x, unit, keep, cols, n, theta, index):
    m, l, low, high, low_at, high_at = stats
    sums, _, _ = fold_exp((m, l), x, unit, keep, cols, n, theta)
    m, l = sums
    # from (0, nowhere) on: min(min s, 0), and the key that it came from; by place, not by value,
    # because the backward's products may round differently
    shown = x
    if keep is not None:
        shown = tl.where(keep, x, 0.0)
    value, place = tl.min(shown, 1, return_indices=True)
    first = tl.min(cols, 1)
    low_at = tl.where(value < low, first + place, low_at)
    low = tl.minimum(low, value)
    value, place = tl.max(shown, 1, return_indices=True)
    high_at = tl.where(value > high, first + place, high_at)
    high = tl.maximum(high, value)
    return m, l, low, high, low_at, high_at


@jit
def width_of(low, high, unit):
    """b - a + eps, or 0 for rows whose scores are all 0."""
    width = (high - low) * unit
    return tl.where(width > 0, width + 1e-10, 0.0)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    m, l, low, high, low_at, high_at = stats
    return stats, (x - low[:, None]) * power_of_two(x, m[:, None], unit), 1.0


@jit
def finish(stats, unit, n, theta):
    m, l, low, high, low_at, high_at = stats
    pivot, part = pivot_and_share((m, l))
    share = inverse(width_of(low, high, unit))
    places = low_at.to(tl.float32, bitcast=True), high_at.to(tl.float32, bitcast=True)
    return inverse(l) * unit * share, (pivot, part, low * unit, share, places[0], places[1])


@jit
def delta(x, unit, cols, dp, saved, delta0, n, theta):
    return normalised(x, unit, saved) * dp


@jit
def grad_detached(x, unit, cols, dp, saved, delta, n, theta):
    low, share = saved[2], saved[3]
    p = normalised(x, unit, saved)
    y = (x * unit - low) * share
    return p * y, tl.where(share > 0, p * ((share + y) * dp - delta[0]), 0.0)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    w, ds = grad_detached(x, unit, cols, dp, saved, delta, n, theta)
    low_at = saved[4].to(tl.int32, bitcast=True)
    high_at = saved[5].to(tl.int32, bitcast=True)
    ds += tl.where(cols == low_at, (delta[0] - delta[1]) * saved[3], 0.0)
    ds -= tl.where(cols == high_at, delta[0] * saved[3], 0.0)
    return w, ds


X = Hooks(peak_and_sum, no_sweep, fold_x, finish_x, grad_x, no_delta, saves=2, scaled=True)
X_FAST = X._replace(fold=fold_x_fast, finish=finish_x_fast, grad=grad_x_fast)
DETACHED = Hooks(
    start, sweep, fold, finish, grad_detached, no_delta,
    saves=6, sweeps=1, rescales=False, scaled=True, cost=3,
)  # fmt: skip
MINMAX0 = DETACHED._replace(grad=grad, delta=delta, delta_sweep=True)


def hooks(options, case):
    if options["form"] == "x":
        return X if far(case) else X_FAST
    return DETACHED if options["detach_minmax"] else MINMAX0


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    nonnegative=False,
    hooks=hooks,
    options={
        "form": Option("minmax0", "factor of the softmax", choices=("x", "minmax0"), number=False),
        "detach_minmax": Option(
            False, "no gradient through min and max", choices=(False, True), number=False
        ),
    },
)
