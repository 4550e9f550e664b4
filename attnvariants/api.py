"""The functional call: one contract for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnvariants import chunked, engines, reference
from attnvariants.autocast import autocast_inputs, no_autocast
from attnvariants.context import fake_mode
from attnvariants.magnitude import beyond_float32
from attnvariants.problem import build, prepare
from attnvariants.registry import Variant, get_variant
from attnvariants.scalars import check_flag


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: str | Variant = "softmax",
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    position: int | Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    impl: str = "auto",
    return_weights: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """Attention with any normaliser in place of the softmax.

        s_ij = softcap(scale q_i . k_j) - slope |i + kv_len - q_len - j| + bias_ij
        out_i = sum_j w_ij v_j,    w_i. = variant(s_i. over the visible keys)

    where softcap(x) = c tanh(x / c). A row that sees no key gives 0 and takes no gradient.

    Numbers and flags may be Python's, numpy's or tensors of one element, which are read.

    Args:
        query: `[batch, heads, q_len, head_dim]`, floating point, any strides.
        key: `[batch, kv_heads, kv_len, head_dim]`; heads is a multiple of kv_heads (GQA, MQA).
        value: `[batch, kv_heads, kv_len, value_dim]`.
        variant: a name from `list_variants()` or a `Variant`.
        attn_mask: bool, True = visible, or float, added to the scores as in PyTorch's SDPA, its
            entries at or below half its dtype's minimum (-inf included) hidden and no others: a
            key at -1e4 is there, and counts (`patch` reads such numbers of a model as hidden);
            broadcasts to [batch, heads, q_len, kv_len].
        bias: float, added to the scores, with a gradient; broadcasts likewise; -inf hides.
        causal: hide the future; the last query is aligned with the last key (bottom right).
        window_size: (left, right), keys within `position - left .. position + right`; -1 is
            unlimited, as in flash-attn.
        alibi_slopes: `[heads]` or `[batch, heads]`, with a gradient (Press et al., 2021,
            arXiv:2108.12409).
        softcap: cap c of the scores; None or 0 is off.
        scale: score multiplier; the default is 1/sqrt(head_dim), or the variant's own.
        position: where the first query stands among the keys, an integer or an int64 scalar on
            their device, for variants that read positions (cosformer) and keys with a tail of
            empty slots that `attn_mask` hides, as a static cache's; the default is kv_len - q_len.
        dropout_p: probability of dropping a weight; kept ones are divided by 1 - p.
        generator: source of the dropout's seed; the mask is the same in every engine.
        impl: "reference" (dense), "chunked" (row blocks, O(tokens) memory, any call on any
            device), "triton" (fused kernels), "sdpa" (softmax and ssmax by torch's
            scaled_dot_product_attention or flash-attn) or "auto"; `explain` says which that is.
            Transforms of torch.func, forward-mode derivatives, torch.jit.trace and
            torch.onnx.export take "reference" in "auto". Second and third derivatives
            are those of "reference", "chunked" and "sdpa"; fourth ones of "reference" alone.
        return_weights: also return the weights as applied, `[batch, heads, q_len, kv_len]`;
            differentiable with impl="reference" alone.
        return_stats: also return the rows' `RowStats`.
        **options: the variant's own, numbers or, where learned, tensors `[heads]` that get their
            gradient.

    Returns:
        `[batch, heads, q_len, value_dim]` in value's dtype, or a tuple of it and what else was
        asked for, weights before statistics. Half precision is computed in float32, by "triton"
        and "sdpa" with products of half precision; what float32 could not hold on the way, such
        as scores of 1e39, the engines in torch compute in float64 (not while compiling). A result
        that its dtype cannot hold is infinite.

    Raises:
        ValueError: an argument is out of the contract, or means nothing for the variant, or the
            engine that `impl` names cannot run the call.
    """
    return _attention(
        query,
        key,
        value,
        get_variant(variant),
        options,
        impl=engines.check_impl(impl),
        attn_mask=attn_mask,
        bias=bias,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        position=position,
        dropout_p=dropout_p,
        generator=generator,
        return_weights=return_weights,
        return_stats=return_stats,
    )


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    options: dict[str, Any],
    *,
    impl: str = "auto",
    return_weights: bool = False,
    return_stats: bool = False,
    **call: Any,
) -> Any:
    return_weights = check_flag("return_weights", return_weights)
    return_stats = check_flag("return_stats", return_stats)
    query, key, value = autocast_inputs(query, key, value)
    with fake_mode(query), no_autocast(query):
        problem = build(query, key, value, variant, options, **call)
        engine = engines.choose(impl, query, key, value, problem)
        inputs = query, key, value
        query, key = prepare(query, key, problem)
        if engine != "triton" and beyond_float32(query, key, value, problem):
            q, k, v = (tensor.double() for tensor in inputs)
            results = _attention(
                q,
                k,
                v,
                variant,
                options,
                impl=engine,
                return_weights=return_weights,
                return_stats=return_stats,
                # drawn once
                seed=None if problem.dropout is None else problem.dropout.seed,
                **call,
            )
            return _rounded(results, value.dtype)
        if engine == "reference":
            out, weights, stats = reference.attention(query, key, value, problem, return_stats)
        else:
            out = engines.run(engine, query, key, value, problem)
            weights, stats = None, None
            if return_weights or return_stats:
                weights, stats = engines.weights_and_stats(
                    query, key, problem, return_weights, return_stats
                )
    extra: list[Any] = [weights] if return_weights else []
    extra += [stats] if return_stats else []
    return (out, *extra) if extra else out


def _rounded(results: Any, dtype: torch.dtype) -> Any:
    """What a call in float64 gave, in the dtypes of one in float32."""
    if isinstance(results, Tensor):
        return results.to(dtype)
    out, *extra = results
    return out.to(dtype), *(_in_float32(item) for item in extra)


def _in_float32(item: Any) -> Any:
    if isinstance(item, tuple):
        return type(item)(*(_in_float32(part) for part in item))
    return item.float() if item.is_floating_point() else item


def iter_weights(
    query: Tensor,
    key: Tensor,
    variant: str | Variant = "softmax",
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    position: int | Tensor | None = None,
    **options: Any,
) -> Iterator[chunked.WeightBlock]:
    """The weights of a call block by block, never all at once and without a gradient.

    Args:
        As `attention`'s.

    Yields:
        `WeightBlock`s that cover every row that sees a key; the weights of all others are 0.

    Raises:
        ValueError: as `attention`, at the call.
    """
    query, key = autocast_inputs(query, key)
    with torch.no_grad(), no_autocast(query):
        problem = build(
            query,
            key,
            key,
            get_variant(variant),
            options,
            attn_mask=attn_mask,
            bias=bias,
            causal=causal,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            scale=scale,
            position=position,
        )
        prepared = prepare(query, key, problem)
        wide = beyond_float32(*prepared, key, problem)
        if wide:
            prepared = prepare(query.double(), key.double(), problem)
    found = chunked.weight_blocks(*prepared, problem)
    if not wide:
        return found
    return (block._replace(weights=block.weights.float()) for block in found)
