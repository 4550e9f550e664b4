"""Self-Adjust Softmax: the softmax times its own scores.

    w_j = y_j softmax(s)_j
    form "x":        y_j = s_j
    form "minmax0":  y_j = (s_j - a) / (b - a + 1e-10)
                     a = min(min_k s_k, 0),    b = max(max_k s_k, 0)

min and max run over the visible keys. With form "x" weights may be negative; with "minmax0" they
lie in [0, 1] and a row sums to at most one; a row whose scores are all 0 gets no weight and no
gradient.
The gradient flows through min and max unless `detach_minmax`.
Source: Zheng et al., 2025, arXiv:2502.18277.
"""

import torch

from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E, exp_fused, exp_ratio

# the authors' constant, kept so that trained models carry over
_EPS = 1e-10


def ratio(scores, rows, *, form, detach_minmax):
    e, total = exp_ratio(scores)
    # a hidden key's score is -inf and its weight 0: keep their product out of NaN
    x = scores.masked_fill(scores.isneginf(), 0.0)
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


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    nonnegative=False,
    options={
        "form": Option("minmax0", "factor of the softmax", choices=("x", "minmax0"), number=False),
        "detach_minmax": Option(
            False, "no gradient through min and max", choices=(False, True), number=False
        ),
    },
)
