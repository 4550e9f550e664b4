"""Scalable-Softmax: a softmax whose temperature follows the number of visible keys.

    w_j = n^{s z_j} / sum_k n^{s z_k} = softmax((s log n + b) z)_j,    z = scale q.k

n is the number of keys that the row sees, s (and optionally b) one learned number per head.
Rows sum to one; attention does not fade as the context grows. The temperature multiplies q.k
(as a prescaled query does); softcap, ALiBi and bias act on the result.
Source: Nakanishi, 2025, arXiv:2501.19399.
"""

import math

from attnvariants.registry import Option, Variant
from attnvariants.variants._shared import LOG2E, exp_fused, exp_ratio
from attnvariants_kernels.hooks import softmax


def prepare(query, key, rows, *, s, b):
    return query * (s * rows.visible.clamp(min=1).log() + b), key


def ratio(scores, rows, *, s, b):
    return exp_ratio(scores)


def fused(scores, rows, *, s, b):
    return exp_fused(scores)


def retrofit(train_length: int) -> dict[str, float]:
    # ln n! / n is the mean of ln over 1..n: it makes the mean temperature of training 1.
    mean_log = math.lgamma(train_length + 1) / train_length
    return {"s": 1.0 / mean_log if mean_log > 0 else 1.0}


VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    fused=fused,
    fused_unit=LOG2E,
    prepare=prepare,
    row_temperature=True,
    row_sum="one",
    softmax_scores=True,
    hooks=softmax,
    options={
        "s": Option(1.0, "factor of log n, one per head", learned=True, in_prepare=True),
        "b": Option(0.0, "offset of the temperature, one per head", learned=True, in_prepare=True),
    },
    default_learned=("s",),
    presets={"pretrain": lambda train_length: {"s": 1.0}, "retrofit": retrofit},
)
