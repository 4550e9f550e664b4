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
from attnvariants_kernels.hooks import Hooks, no_delta, no_sweep

# In units of log 2: up to this score e^s is far from overflow and needs no shift.
_UNSHIFTED = 40.0
# Where a row's largest score is above this, e^s - 1 loses nothing that counts to cancellation.
_CANCELS = 0.7


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
def fold(stats, x, unit, keep, cols, n, theta):
    # e^s - 1 loses 6e-8 / |s| to cancellation, which rows of scores under 0.01 feel in bfloat16
    m, l = stats
    c = unit * fn.LOG2E
    peak = tl.maximum(m, tl.max(x, 1) * c)
    size = tl.exp2(x * c - peak[:, None]) - tl.exp2(-peak)[:, None]
    rescale = tl.exp2(m - peak)
    return (peak, l * rescale + tl.sum(tl.abs(size), 1)), tl.maximum(size, 0.0), rescale


@jit
def fold_exact(stats, x, unit, keep, cols, n, theta):
    m, l = stats
    s = x * unit
    peak = tl.maximum(m, tl.max(s, 1) * fn.LOG2E)
    size = -fn.expm1(-tl.abs(s)) * tl.exp2(tl.maximum(s, 0.0) * fn.LOG2E - peak[:, None])
    rescale = tl.exp2(m - peak)
    return (peak, l * rescale + tl.sum(size, 1)), tl.where(s > 0, size, 0.0), rescale


@jit
def finish(stats, unit, n, theta):
    m, l = stats
    return 1.0 / (l + theta[0]), (m + tl.log2(l + theta[0]),)


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    e = tl.exp2(x * (unit * fn.LOG2E) - saved[0])
    w = tl.maximum(e - tl.exp2(-saved[0]), 0.0)
    return w, e * tl.where(x > 0, dp - delta[0], tl.where(x < 0, delta[0], 0.0))


@jit
def grad_exact(x, unit, cols, dp, saved, delta, n, theta):
    s = x * unit
    e = tl.exp2(s * fn.LOG2E - saved[0])
    w = tl.where(s > 0, -fn.expm1(-s) * e, 0.0)
    return w, e * tl.where(x > 0, dp - delta[0], tl.where(x < 0, delta[0], 0.0))


HOOKS = Hooks(start, no_sweep, fold, finish, grad, no_delta, hidden=0.0, hides=True, wide=True)
EXACT = HOOKS._replace(fold=fold_exact, grad=grad_exact)

VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    hidden=0.0,
    row_sum="at most one",
    hooks=lambda options, case: EXACT if case.dtype == "float32" else HOOKS,
    theta=lambda options, case: (options["eps"],),
    options={"eps": Option(1e-6, "added to the scaled denominator", above=0.0)},
)
