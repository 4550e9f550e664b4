"""LSSA: softplus attention on cosine scores whose scale follows the number of visible keys.

    w_j = softplus(x_j) / sum_k softplus(x_k),    x_j = log d log n cos(q, k_j)

d is the head dimension, n the number of keys that the row sees; there is no 1/sqrt(d). `scale`
multiplies x (default 1); softcap, ALiBi and bias act on x. Rows sum to one.
Source: Gao et al., 2025, arXiv:2501.13428 (version 5).
"""

from attnvariants.registry import Variant
from attnvariants.variants._shared import LOG2E, scaled_cosine, softplus_fused, softplus_ratio


def ratio(scores, rows):
    return softplus_ratio(scores)


def fused(scores, rows):
    return softplus_fused(scores)


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    prepare=scaled_cosine,
    scale=1.0,
    row_sum="one",
)
