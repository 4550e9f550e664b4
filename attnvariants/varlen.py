"""Packed sequences, in flash-attn's layout."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnvariants import checks, engines, fused, scalars
from attnvariants.api import attention
from attnvariants.autocast import autocast_inputs, no_autocast
from attnvariants.context import shapes_alone, unguarded
from attnvariants.geometry import Packed
from attnvariants.problem import Problem, RowStats, build, compute_dtype, prepare
from attnvariants.registry import Variant, get_variant


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
        max_seqlen_q: accepted for flash-attn's sake, an integer or a tensor of one; if given, no
            sequence may be longer.
        max_seqlen_k: likewise.
        alibi_slopes: `[heads]` or `[sequences, heads]`.
        return_weights: also return a list of `[heads, q_len, kv_len]`, one a sequence.
        return_stats: also return `RowStats` of `[heads, tokens_q]`.
        variant, causal, window_size, softcap, scale, dropout_p, generator, impl, options: as in
            `attention`, causality and windows aligned in each sequence by itself. Fused kernels
            ("triton") take all sequences in one launch, unless there is dropout or weights or
            statistics are asked for; all else runs one sequence after another.

    Returns:
        `[tokens_q, heads, value_dim]`, or a tuple of it and what else was asked for.

    Raises:
        ValueError: as `attention`; or boundaries that do not start at 0, decrease, do not end at
            the number of tokens, or differ in number; or sequences longer than max_seqlen allows.
    """
    impl, chosen = engines.check_impl(impl), get_variant(variant)
    dropout_p = scalars.check_number("dropout_p", dropout_p, 0.0, 1.0)
    return_weights = scalars.check_flag("return_weights", return_weights)
    return_stats = scalars.check_flag("return_stats", return_stats)
    packed = pack(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call: dict[str, Any] = {
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "scale": scale,
    }
    if not (return_weights or return_stats or dropout_p):
        out = _in_one_launch(
            query, key, value, chosen, options, impl, packed, alibi_slopes=alibi_slopes, **call
        )
        if out is not None:
            return out

    if unguarded():
        raise ValueError(
            "attention_varlen cannot be recorded by torch.jit.trace or torch.onnx.export, which "
            "would keep the boundaries cu_seqlens_q and cu_seqlens_k of this call for all others; "
            "pad the sequences and call attention with a mask."
        )
    results = []
    if alibi_slopes is not None:
        alibi_slopes = checks.check_slopes(
            alibi_slopes, cu_seqlens_q.shape[0] - 1, query.shape[1], query.device
        )
        # gradients of the sequences add up in it, and are rounded once
        alibi_slopes = alibi_slopes.to(compute_dtype(query))
    options = {name: _summed(value, query) for name, value in options.items()}
    if return_weights and (shapes_alone(packed.cu_q) or shapes_alone(packed.cu_k)):
        raise ValueError(
            "return_weights must be False where cu_seqlens_q has no values (on the meta "
            "device, or fake): the weights' sizes depend on them."
        )
    bounds_q, bounds_k = bounds_of(cu_seqlens_q, query), bounds_of(cu_seqlens_k, key)
    if len(bounds_q) == 1:
        # no sequence at all: one empty one has the same output, and its call the same checks
        bounds_q, bounds_k, alibi_slopes = [0, 0], [0, 0], None
    for index in range(len(bounds_q) - 1):
        span_q, span_k = slice(*bounds_q[index : index + 2]), slice(*bounds_k[index : index + 2])
        slopes = None
        if alibi_slopes is not None:
            slopes = alibi_slopes[index if alibi_slopes.shape[0] > 1 else 0]
        result = attention(
            sequence(query, span_q),
            sequence(key, span_k),
            sequence(value, span_k),
            chosen,
            alibi_slopes=slopes,
            dropout_p=dropout_p,
            generator=generator,
            impl=impl,
            return_weights=return_weights,
            return_stats=return_stats,
            **call,
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


def _summed(option: Any, like: Tensor) -> Any:
    """An option of all sequences, in the dtype that their gradients are to add up in."""
    learned = isinstance(option, Tensor) and option.is_floating_point()
    return option.to(compute_dtype(like)) if learned else option


def pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Packed:
    """Validate what describes packed sequences.

    Raises:
        ValueError: as `attention_varlen`.
    """
    checks.check_qkv(query, key, value, checks.PACKED)
    bounds_q = checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], "query")
    bounds_k = checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], "key")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must describe as many sequences, "
            f"got {cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}."
        )
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.is_meta and not query.is_meta:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {cu_seqlens.device}; "
                "move it."
            )
    longest = []
    for name, limit, bounds, tokens in (
        ("max_seqlen_q", max_seqlen_q, bounds_q, query.shape[0]),
        ("max_seqlen_k", max_seqlen_k, bounds_k, key.shape[0]),
    ):
        if limit is not None:
            limit = scalars.plain(name, limit)
            if not scalars.is_whole(limit):
                got = scalars.in_words(limit)
                raise ValueError(
                    f"{name} must be an integer or None, got {got}; None measures the sequences."
                )
        if bounds is None:
            # not to be read while compiling: the limit is trusted, or none is known
            longest.append(tokens if limit is None else limit)
            continue
        longest.append(max((b - a for a, b in pairwise(bounds)), default=0))
        if limit is not None and longest[-1] > limit:
            raise ValueError(
                f"{name} is {limit}, but a sequence has {longest[-1]} tokens; pass at least that, "
                "or None."
            )
    # kernels read them as neighbours in memory
    cu_q, cu_k = (
        cu.to(query.device, torch.int32).contiguous() for cu in (cu_seqlens_q, cu_seqlens_k)
    )
    return Packed(cu_q, cu_k, *longest)


def packed_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: dict[str, Any],
    packed: Packed,
    **call: Any,
) -> tuple[Tensor, Tensor, Tensor, Problem]:
    """One call of all sequences: the tensors as [1, heads, tokens, ...] and the rest."""
    query, key, value = (sequence(t, slice(None)) for t in (query, key, value))
    return query, key, value, build(query, key, value, variant, options, packed=packed, **call)


def _in_one_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: dict[str, Any],
    impl: str,
    packed: Packed,
    **call: Any,
) -> Tensor | None:
    """The output of fused kernels for all sequences at once; None if they are not to run it."""
    against = {"triton": fused.why_not, "auto": engines.against_triton}.get(impl)
    if against is None or packed.cu_q.shape[0] == 1:
        return None
    if impl == "auto" and query.device.type != "cuda":
        return None
    query, key, value = autocast_inputs(query, key, value)
    with no_autocast(query):
        query, key, value, problem = packed_problem(
            query, key, value, variant, options, packed, **call
        )
        if against(query, key, value, problem):
            return None
        query, key = prepare(query, key, problem)
        return engines.run("triton", query, key, value, problem)[0].transpose(0, 1)


def bounds_of(cu_seqlens: Tensor, tokens: Tensor) -> list[int]:
    """The boundaries as integers; where nothing has values, any that give the same shapes.

    Args:
        cu_seqlens: `[sequences + 1]`, as checked.
        tokens: `[tokens, heads, width]`, the query or key that they are of.
    """
    if not shapes_alone(cu_seqlens):
        return cu_seqlens.tolist()
    several, total = cu_seqlens.shape[0] - 1, tokens.shape[0]
    return [total * index // max(several, 1) for index in range(several + 1)]


def sequence(tensor: Tensor, span: slice) -> Tensor:
    """`[tokens, heads, width]` to the `[1, heads, tokens, width]` of one sequence."""
    return tensor[span].transpose(0, 1).unsqueeze(0)
