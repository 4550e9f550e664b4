"""Softmax, the baseline.

    w_j = e^{s_j} / sum_k e^{s_k}

Rows sum to one, so a head that has nothing to say must still put its weight somewhere.
Source: Vaswani et al., 2017, arXiv:1706.03762.
"""

from attnvariants.registry import Variant
from attnvariants.variants._shared import exp_ratio, exp_ratio_inplace


def ratio(scores, rows):
    return exp_ratio(scores)


def inplace(scores, rows):
    return exp_ratio_inplace(scores)


VARIANT = Variant(doc=__doc__, ratio=ratio, inplace=inplace, row_sum="one")
