"""Drop-in signatures: PyTorch's scaled_dot_product_attention and flash-attn's two functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnvariants.api import _attention, _engine
from attnvariants.registry import Variant, get_variant
from attnvariants.varlen import attention_varlen


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    variant: str | Variant = "softmax",
    impl: str = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with a variant.

    Args:
        query: `[..., heads, q_len, head_dim]`, or `[..., q_len, head_dim]` of 2 or 3 dimensions.
        key: `[..., kv_heads, kv_len, head_dim]`; kv_heads may differ only with `enable_gqa`.
        value: `[..., kv_heads, kv_len, value_dim]`.
        attn_mask: bool (True = visible) or float (added); broadcasts to [..., q_len, kv_len].
        is_causal: upper-left aligned, as in PyTorch: row i sees keys 0 .. i.
        dropout_p, scale, variant, impl, generator, options: as in `attention`.

    Returns:
        `[..., heads, q_len, value_dim]`.

    Raises:
        ValueError: as `attention`; or both `attn_mask` and `is_causal` are given.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True; put causality in the mask.")
    tensors = query, key, value
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or tensor.dim() != query.dim():
            raise ValueError(
                f"{name} must be a tensor of as many dimensions as query, at least 2, "
                f"got {list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor)}."
            )
    lead = query.shape[:-2]
    if query.dim() != 4:
        for name, tensor in (("key", key), ("value", value)):
            if tensor.shape[:-3] != query.shape[:-3]:
                raise ValueError(
                    f"{name} must have query's leading sizes {list(query.shape[:-3])}, "
                    f"got {list(tensor.shape[:-3])}."
                )
        query, key, value = (_four(tensor) for tensor in tensors)
        if attn_mask is not None and attn_mask.dim() > 2:
            full = attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:])
            attn_mask = _four(full)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"key has {key.shape[1]} heads and query has {query.shape[1]}; "
            "pass enable_gqa=True if that is meant."
        )
    out = _attention(
        query,
        key,
        value,
        get_variant(variant),
        options,
        impl=_engine(impl),
        attn_mask=attn_mask,
        causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        generator=generator,
        offset=0,
    )
    return out if query is tensors[0] else out.reshape(*lead, *out.shape[-2:])


def _four(tensor: Tensor) -> Tensor:
    if tensor.dim() < 4:
        return tensor.view((1,) * (4 - tensor.dim()) + tuple(tensor.shape))
    return tensor.flatten(0, -4)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    variant: str | Variant = "softmax",
    impl: str = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    """flash-attn's `flash_attn_func` with a variant.

    Args:
        q: `[batch, q_len, heads, head_dim]`.
        k: `[batch, kv_len, kv_heads, head_dim]`.
        v: `[batch, kv_len, kv_heads, value_dim]`.
        causal: bottom-right aligned.
        deterministic: accepted; every engine here is.
        return_attn_probs: also return `softmax_lse` [batch, heads, q_len], the log-sum-exp of the
            scores in float32, and the weights if there is dropout, negative where dropped.
        dropout_p, softmax_scale, window_size, softcap, alibi_slopes, variant, impl, generator,
            options: as in `attention`.

    Returns:
        `[batch, q_len, heads, value_dim]`, or (that, softmax_lse, weights or None).

    Raises:
        ValueError: as `attention`.
    """
    result = _attention(
        _swap("q", q),
        _swap("k", k),
        _swap("v", v),
        get_variant(variant),
        options,
        impl=_engine(impl),
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=softmax_scale,
        dropout_p=dropout_p,
        generator=generator,
        return_weights=return_attn_probs and dropout_p > 0,
        return_stats=return_attn_probs,
    )
    if not return_attn_probs:
        return result.transpose(1, 2)
    weights = result[1] if dropout_p > 0 else None
    return result[0].transpose(1, 2), result[-1].lse.float(), weights


def _swap(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() != 4:
        got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} must have 4 dimensions, [batch, tokens, heads, head_dim], got {got}."
        )
    return tensor.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    variant: str | Variant = "softmax",
    impl: str = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    """flash-attn's `flash_attn_varlen_func` with a variant.

    Args:
        q: `[tokens_q, heads, head_dim]`; k and v `[tokens_k, kv_heads, ...]`.
        block_table: paged caches are not supported; must be None.
        return_attn_probs: also return `softmax_lse` [heads, tokens_q] and None.
        The others are those of `attention_varlen` and `flash_attn_func`.

    Returns:
        `[tokens_q, heads, value_dim]`, or (that, softmax_lse, None).

    Raises:
        ValueError: as `attention_varlen`; or a block table is given.
    """
    if block_table is not None:
        raise ValueError("block_table must be None: paged caches are not supported; unpage k, v.")
    result = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        variant,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=softmax_scale,
        dropout_p=dropout_p,
        generator=generator,
        impl=impl,
        return_stats=return_attn_probs,
        **options,
    )
    if not return_attn_probs:
        return result
    return result[0], result[1].lse.float(), None
