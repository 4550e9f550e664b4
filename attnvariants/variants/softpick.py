"""Softpick: a rectified softmax that may give a row no weight at all.

    w_j = relu(e^{s_j} - 1) / (sum_k |e^{s_k} - 1| + eps e^m),    m = max(0, max_k s_k)

Weights are >= 0, exactly 0 for scores <= 0, and a row sums to at most one. eps acts on the
denominator divided by e^m, as in the authors' kernel.
Source: Zuhri et al., 2025, arXiv:2504.20966.
"""

import torch

from attnvariants.registry import Option, Variant

# Below this score e^s cannot overflow float32, so no shift by the maximum is needed.
_UNSHIFTED = 60.0


def ratio(scores, rows, *, eps):
    peak = scores.amax(-1, keepdim=True).detach().clamp(min=0)
    # e^{s-m} - e^{-m} with neither overflow nor cancellation near s = 0.
    size = -torch.expm1(-scores.abs()) * (scores.clamp(min=0) - peak).exp()
    return torch.where(scores > 0, size, 0.0), size.sum(-1, keepdim=True) + eps


def inplace(scores, rows, *, eps):
    peak = scores.amax(-1, keepdim=True).clamp(min=0)
    if float(peak.max()) > _UNSHIFTED:
        return ratio(scores, rows, eps=eps)
    x = scores.expm1_()
    total = x.sum(-1, keepdim=True)
    positive = x.relu_()
    # sum |x| = 2 sum relu(x) - sum x
    return positive, 2 * positive.sum(-1, keepdim=True) - total + eps * peak.exp()


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    inplace=inplace,
    hidden=0.0,
    row_sum="at most one",
    options={"eps": Option(1e-6, "added to the scaled denominator", above=0.0)},
)
