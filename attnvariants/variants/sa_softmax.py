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
    finish_exp,
    fold_exp,
    log_sum,
    no_delta,
    no_sweep,
    peak_and_sum,
)  # fmt: skip

# the authors' constant, kept so that trained models carry over
_EPS = 1e-10


def ratio(scores, rows, *, form, detach_minmax):
    e, total = exp_ratio(scores)
    # a hidden key's score is -inf and its weight 0: keep their product out of NaN
    x = scores.masked_fill(scores == -math.inf, 0.0)
    if form == "x":
        return x * e, total
    source = x.detach() if detach_minmax else x
    low = source.amin(-1, keepdim=True).clamp(max=0)
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
def finish_x(stats, unit, n, theta):
    factor, saved = finish_exp(stats, unit, n, theta)
    return factor * unit, saved


@jit
def grad_x(x, unit, cols, dp, saved, delta, n, theta):
    p = tl.exp2(x * (unit * fn.LOG2E) - saved[0])
    w = p * (x * unit)
    return w, w * dp + p * (dp - delta[0])


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
    e = tl.exp2(x * (unit * fn.LOG2E) - m[:, None])
    return stats, (x - low[:, None]) * e, 1.0


@jit
def finish(stats, unit, n, theta):
    m, l, low, high, low_at, high_at = stats
    factor, lse = log_sum((m, l))
    width = width_of(low, high, unit)
    inverse = tl.where(width > 0, 1.0 / width, 0.0)
    places = low_at.to(tl.float32, bitcast=True), high_at.to(tl.float32, bitcast=True)
    return factor * unit * inverse, (lse, low * unit, inverse, places[0], places[1])


@jit
def delta(x, unit, cols, dp, saved, delta0, n, theta):
    return tl.exp2(x * (unit * fn.LOG2E) - saved[0]) * dp


@jit
def grad_detached(x, unit, cols, dp, saved, delta, n, theta):
    lse, low, inverse = saved[0], saved[1], saved[2]
    p = tl.exp2(x * (unit * fn.LOG2E) - lse)
    y = (x * unit - low) * inverse
    return p * y, tl.where(inverse > 0, p * ((inverse + y) * dp - delta[0]), 0.0)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    w, ds = grad_detached(x, unit, cols, dp, saved, delta, n, theta)
    low_at = saved[3].to(tl.int32, bitcast=True)
    high_at = saved[4].to(tl.int32, bitcast=True)
    ds += tl.where(cols == low_at, (delta[0] - delta[1]) * saved[2], 0.0)
    ds -= tl.where(cols == high_at, delta[0] * saved[2], 0.0)
    return w, ds


X = Hooks(peak_and_sum, no_sweep, fold_x, finish_x, grad_x, no_delta, proportional=True)
DETACHED = Hooks(
    start, sweep, fold, finish, grad_detached, no_delta,
    saves=5, sweeps=1, rescales=False, proportional=True, wide=True, cost=3,
)  # fmt: skip
MINMAX0 = DETACHED._replace(grad=grad, delta=delta, delta_sweep=True)


def hooks(options, case):
    if options["form"] == "x":
        return X
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
