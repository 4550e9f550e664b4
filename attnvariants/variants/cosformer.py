"""cosFormer: linear attention on rectified features, re-weighted by a cosine of the distance.

    w_j = c_j / max(sum_k c_k, 1e-6),    c_j = scale relu(q).relu(k_j) cos(pi/2 (i - j) / max_len)

i and j are positions, the queries' being the last ones of the keys'. cos(a - b) splits into
products, so c = q'.k' with features of twice the width. Default scale 1. `max_len` None takes the
longer of query and key, as the authors do; then cached decoding differs from prefill, so fix it
for generation. Rows sum to one, or less where the sum falls under 1e-6. Kernels run causal and
full calls in linear time; `attnvariants.recurrent` decodes with a state in place of the keys.
Source: Qin et al., 2022, arXiv:2202.08791.
"""

import math

import torch

from attnvariants.registry import Option, Variant
from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.hooks import Hooks, no_delta, no_stats, no_sweep

EPS = 1e-6


def prepare(query, key, rows, *, max_len):
    def features(x, position, longest):
        angle = position.double() * (math.pi / 2) / (max_len or longest)
        angle = angle.unsqueeze(-1)
        x = x.relu()
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)

    of_queries, of_keys = rows.positions(query, key)
    return features(query, *of_queries), features(key, *of_keys)


def ratio(scores, rows, *, max_len):
    return scores, scores.sum(-1, keepdim=True).clamp(min=EPS)


@jit
def fold(stats, x, unit, keep, cols, n, theta):
    return (stats[0] + tl.sum(x, 1),), x, 1.0


@jit
def finish(stats, unit, n, theta):
    total = stats[0] * unit
    inverse = 1.0 / tl.maximum(total, theta[0])
    return inverse * unit, (inverse, tl.where(total >= theta[0], 1.0, 0.0))


@jit
def grad(x, unit, cols, dp, saved, delta, n, theta):
    inverse, alive = saved
    return x * (unit * inverse), (dp - alive * delta[0]) * inverse


HOOKS = Hooks(
    no_stats, no_sweep, fold, finish, grad, no_delta,
    hidden=0.0, saves=2, rescales=False, scaled=True, cost=3,
)  # fmt: skip


def check(rows, options, scale):
    if scale < 0:
        raise ValueError(f"cosformer's scale must be >= 0 to keep its weights so, got {scale:g}.")
    max_len = options["max_len"]
    if max_len is None or isinstance(rows.kv_len, torch.Tensor):
        return
    longest = max(rows.q_len, rows.kv_len)
    if longest > max_len:
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
    hooks=HOOKS,
    theta=lambda options, case: (EPS,),
    width_factor=2,
    linear_eps=EPS,
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
