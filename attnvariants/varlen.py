"""Packed sequences, in flash-attn's layout."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnvariants import checks
from attnvariants.api import attention
from attnvariants.problem import RowStats
from attnvariants.registry import Variant


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    variant: str | Variant = "softmax",
    *,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    impl: str = "auto",
    return_weights: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """`attention` over sequences packed one after another; none sees another.

    Args:
        query: `[tokens_q, heads, head_dim]`.
        key: `[tokens_k, kv_heads, head_dim]`.
        value: `[tokens_k, kv_heads, value_dim]`.
        cu_seqlens_q: int32 or int64 `[sequences + 1]`, from 0 to tokens_q.
        cu_seqlens_k: likewise for the keys, from 0 to tokens_k.
        max_seqlen_q: accepted for flash-attn's sake; if given, no sequence may be longer.
        max_seqlen_k: likewise.
        alibi_slopes: `[heads]` or `[sequences, heads]`.
        return_weights: also return a list of `[heads, q_len, kv_len]`, one a sequence.
        return_stats: also return `RowStats` of `[heads, tokens_q]`.
        variant, causal, window_size, softcap, scale, dropout_p, generator, impl, options: as in
            `attention`, causality and windows aligned in each sequence by itself.

    Returns:
        `[tokens_q, heads, value_dim]`, or a tuple of it and what else was asked for.

    Raises:
        ValueError: as `attention`; or boundaries that do not start at 0, decrease, do not end at
            the number of tokens, or differ in number.
    """
    checks.check_qkv(query, key, value, rank=3)
    bounds_q = checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], "query")
    bounds_k = checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], "key")
    if len(bounds_q) != len(bounds_k):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe as many sequences, "
            f"got {len(bounds_q) - 1} and {len(bounds_k) - 1}."
        )
    for name, limit, bounds in (
        ("max_seqlen_q", max_seqlen_q, bounds_q),
        ("max_seqlen_k", max_seqlen_k, bounds_k),
    ):
        longest = max((b - a for a, b in pairwise(bounds)), default=0)
        if limit is not None and not isinstance(limit, int):
            raise ValueError(f"{name} must be an integer or None, got {limit!r}.")
        if limit is not None and longest > limit:
            raise ValueError(f"{name} is {limit}, but a sequence has {longest} tokens.")
    if alibi_slopes is not None:
        alibi_slopes = checks.check_slopes(
            alibi_slopes, len(bounds_q) - 1, query.shape[1], query.device
        )

    results = []
    if len(bounds_q) == 1:
        # no sequence at all: one empty one has the same output, and its call the same checks
        bounds_q, bounds_k, alibi_slopes = [0, 0], [0, 0], None
    for index in range(len(bounds_q) - 1):
        span_q, span_k = slice(*bounds_q[index : index + 2]), slice(*bounds_k[index : index + 2])
        slopes = None
        if alibi_slopes is not None:
            slopes = alibi_slopes[index if alibi_slopes.shape[0] > 1 else 0]
        result = attention(
            _sequence(query, span_q),
            _sequence(key, span_k),
            _sequence(value, span_k),
            variant,
            causal=causal,
            window_size=window_size,
            alibi_slopes=slopes,
            softcap=softcap,
            scale=scale,
            dropout_p=dropout_p,
            generator=generator,
            impl=impl,
            return_weights=return_weights,
            return_stats=return_stats,
            **options,
        )
        results.append(result if isinstance(result, tuple) else (result,))
    out = torch.cat([result[0][0] for result in results], 1).transpose(0, 1)
    extra: list[Any] = []
    if return_weights:
        extra.append([result[1][0] for result in results])
    if return_stats:
        columns = zip(*(result[-1] for result in results), strict=True)
        extra.append(RowStats(*(torch.cat([part[0] for part in column], -1) for column in columns)))
    return (out, *extra) if extra else out


def _sequence(tensor: Tensor, span: slice) -> Tensor:
    """`[tokens, heads, width]` to the `[1, heads, tokens, width]` of one sequence."""
    return tensor[span].transpose(0, 1).unsqueeze(0)
