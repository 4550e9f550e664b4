"""cosFormer: linear attention on rectified features, re-weighted by a cosine of the distance.

    w_j = c_j / max(sum_k c_k, 1e-6),    c_j = scale relu(q).relu(k_j) cos(pi/2 (i - j) / max_len)

i and j are positions, the queries' being the last ones of the keys'. cos(a - b) splits into
products, so c = q'.k' with features of twice the width. Default scale 1. `max_len` None takes the
longer of query and key, as the authors do; then cached decoding differs from prefill, so fix it
for generation. Rows sum to one, or less where the sum falls under 1e-6.
Source: Qin et al., 2022, arXiv:2202.08791.
"""

import math

import torch

from attnvariants.registry import Option, Variant

EPS = 1e-6


def prepare(query, key, rows, *, max_len):
    longest = max_len or max(rows.q_len, rows.kv_len, 1)

    def features(x, first):
        angle = torch.arange(first, first + x.shape[-2], device=x.device, dtype=torch.float64)
        angle = (angle * (math.pi / 2 / longest)).unsqueeze(-1)
        x = x.relu()
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)

    return features(query, rows.offset), features(key, 0)


def ratio(scores, rows, *, max_len):
    return scores, scores.sum(-1, keepdim=True).clamp(min=EPS)


def check(rows, options, scale):
    if scale < 0:
        raise ValueError(f"cosformer's scale must be >= 0 to keep its weights so, got {scale:g}.")
    longest, max_len = max(rows.q_len, rows.kv_len), options["max_len"]
    if max_len is not None and longest > max_len:
        raise ValueError(
            f"cosformer's max_len is {max_len} and the call has {longest} positions; beyond "
            f"max_len the cosine turns negative, so pass max_len >= {longest}."
        )


_NO_SCORE = "its weights are products of features, not a function of scores"

VARIANT = Variant(
    doc=__doc__,
    ratio=ratio,
    prepare=prepare,
    scale=1.0,
    hidden=0.0,
    check=check,
    row_sum="at most one",
    refuses={"bias": _NO_SCORE, "alibi_slopes": _NO_SCORE, "softcap": _NO_SCORE},
    options={
        "max_len": Option(
            None,
            "length at which the cosine reaches 0",
            minimum=1,
            from_config="max_position_embeddings",
        )
    },
)
