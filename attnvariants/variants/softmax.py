"""Softmax, the baseline.

    w_j = e^{s_j} / sum_k e^{s_k}

Rows sum to one, so a head that has nothing to say must still put its weight somewhere.
Source: Vaswani et al., 2017, arXiv:1706.03762.
"""

from attnvariants.registry import Variant
from attnvariants.variants._shared import LOG2E, exp_fused, exp_ratio
from attnvariants_kernels.hooks import softmax


def ratio(scores, rows):
    return exp_ratio(scores)


def fused(scores, rows):
    return exp_fused(scores)


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    row_sum="one",
    softmax_scores=True,
    hooks=softmax,
)
