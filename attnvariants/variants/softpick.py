"""Softpick: a rectified softmax that may give a row no weight at all.

    w_j = relu(e^{s_j} - 1) / (sum_k |e^{s_k} - 1| + eps e^m),    m = max(0, max_k s_k)

Weights are >= 0, exactly 0 for scores <= 0, and a row sums to at most one. eps acts on the
denominator divided by e^m, as in the authors' kernel.
Source: Zuhri et al., 2025, arXiv:2504.20966.
"""

import torch

from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E

# In units of log 2: up to this score e^s is far from overflow and needs no shift.
_UNSHIFTED = 40.0
# Where a row's largest score is above this, e^s - 1 loses nothing that counts to cancellation.
_CANCELS = 0.7


def ratio(scores, rows, *, eps):
    peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
    # e^{s-m} - e^{-m} with neither overflow nor cancellation near s = 0.
    size = -torch.expm1(-scores.abs()) * (scores.clamp(min=0) - peak).exp()
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


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    hidden=0.0,
    row_sum="at most one",
    options={"eps": Option(1e-6, "added to the scaled denominator", above=0.0)},
)
