"""Softpick: a rectified softmax that may give a row no weight at all.

    w_j = relu(e^{s_j} - 1) / (sum_k |e^{s_k} - 1| + eps e^m),    m = max(0, max_k s_k)

Weights are >= 0, exactly 0 for scores <= 0, and a row sums to at most one. eps acts on the
denominator divided by e^m, as in the authors' kernel.
Source: Zuhri et al., 2025, arXiv:2504.20966.
"""

import torch

from attnvariants.context import unguarded
from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E
from attnvariants_kernels import functions as fn
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import (
    Hooks,
    far,
    log_sum,
    no_delta,
    no_sweep,
    normalised,
    normalised_fast,
    power_of_two,
    power_of_two_fast,
)

# In units of log 2: up to this score e^s is far from overflow and needs no shift.
_UNSHIFTED = 40.0
# Where a row's largest score is above this, e^s - 1 loses nothing that counts to cancellation.
_CANCELS = 0.7
# More than the kernels' exponential and 1 are off, so little that s takes over under 0.001.
_MARGIN = tl.constexpr(2.0**-21)


def _expm1(x):
    """e^x - 1; where a trace may go to ONNX, from functions that its older exporter knows."""
    return torch.tanh(x / 2) * (x.exp() + 1) if unguarded() else torch.expm1(x)


def ratio(scores, rows, *, eps):
    peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
    # e^{s-m} - e^{-m} with neither overflow nor cancellation near s = 0.
    size = -_expm1(-scores.abs()) * (scores.clamp(min=0) - peak).exp()
    return torch.where(scores > 0, size, 0.0), size.sum(-1, keepdim=True) + eps


def fused(scores, rows, *, eps):
    peak = scores.amax(-1, keepdim=True).detach()
    if float(peak.max()) > _UNSHIFTED:
        return ratio(scores / LOG2E, rows, eps=eps)
    if float(peak.min()) < _CANCELS:
        x = (scores / LOG2E).expm1()
    else:
        x = scores.exp2() - 1 if scores.requires_grad else scores.exp2_().sub_(1)
    floor = eps * peak.clamp(min=0).exp2()
    if scores.requires_grad:
        return x.relu(), x.abs().sum(-1, keepdim=True) + floor
    total = x.sum(-1, keepdim=True)
    positive = x.relu_()
    # sum |x| = 2 sum relu(x) - sum x
    return positive, 2 * positive.sum(-1, keepdim=True) - total + floor


@jit
def start(BLOCK_M: tl.constexpr):
    return tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)


@jit
def above_one(e, x, unit, slope):
    """(e^s - 1) one to half precision's rounding, where e = e^s one, slope = unit one.

    The difference loses 1e-7 / |s| to cancellation. It is never less than s, which is exact for a
    small s, and the margin keeps its own rounding from being more.
    """
    return tl.maximum(e - slope * ((1.0 + _MARGIN) / unit), x * slope)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    m, l = stats
    peak = tl.maximum(m, tl.max(x, 1))
    e = power_of_two_fast(x, peak[:, None], unit)
    size = above_one(e, x, unit, unit * tl.exp2(-peak * (unit * fn.LOG2E))[:, None])
    rescale = power_of_two(m, peak, unit)
    return (peak, l * rescale + tl.sum(tl.abs(size), 1)), tl.maximum(size, 0.0), rescale


@jit
def fold_exact(stats, x, unit, keep, cols, n, theta):
    m, l = stats
    peak = tl.maximum(m, tl.max(x, 1))
    size = power_of_two(tl.maximum(x, 0.0), peak[:, None], unit)
    size = -fn.expm1(-tl.abs(x * unit)) * size
    rescale = power_of_two(m, peak, unit)
    return (peak, l * rescale + tl.sum(size, 1)), tl.where(x > 0, size, 0.0), rescale


@jit
def finish(stats, unit, n, theta):
    factor = 1.0 / (stats[1] + theta[0])
    return factor, (stats[0], factor)


@jit
def finish_fast(stats, unit, n, theta):
    total = stats[1] + theta[0]
    total_log = log_sum(fn.product(stats[0], unit * fn.LOG2E), total)
    # as many rows as `finish` saves
    return 1.0 / total, (total_log, total_log)


@jit
def slope(e, x, dp, delta):
    return e * tl.where(x > 0, dp - delta[0], tl.where(x < 0, delta[0], 0.0))


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    e = normalised_fast(x, unit, saved)
    # the weight of a score under 0 is that of 0
    w = above_one(e, tl.maximum(x, 0.0), unit, unit * tl.exp2(-saved[0]))
    return w, slope(e, x, dp, delta)


@jit
def grad_exact(x, unit, cols, dp, saved, delta, n, theta):
    e = normalised(x, unit, saved)
    w = tl.where(x > 0, -fn.expm1(-x * unit) * e, 0.0)
    return w, slope(e, x, dp, delta)


HOOKS = Hooks(
    start, no_sweep, fold, finish_fast, grad, no_delta,
    hidden=0.0, saves=2, hides=True, scaled=True, cost=1,
)  # fmt: skip
EXACT = HOOKS._replace(fold=fold_exact, finish=finish, grad=grad_exact)

VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    hidden=0.0,
    row_sum="at most one",
    hooks=lambda options, case: EXACT if far(case) else HOOKS,
    theta=lambda options, case: (options["eps"],),
    options={"eps": Option(1e-6, "added to the scaled denominator", above=0.0)},
)
