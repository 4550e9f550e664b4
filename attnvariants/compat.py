"""Drop-in signatures: PyTorch's scaled_dot_product_attention and flash-attn's two functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnvariants.api import _attention, attention
from attnvariants.engines import check_impl
from attnvariants.problem import RowStats
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
        query: `[..., heads, q_len, head_dim]`, or `[..., q_len, head_dim]` of 2 or 3 dimensions;
            leading sizes of the three broadcast as PyTorch's do.
        key: `[..., kv_heads, kv_len, head_dim]`; heads may be a multiple with `enable_gqa`.
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
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor of at least 2 dimensions, got {got}.")
    lead = _leading(query, key, value, enable_gqa)
    query, key, value = (
        _four(tensor, (*lead[:-1], tensor.shape[-3]) if enable_gqa else lead)
        for tensor in (query, key, value)
    )
    if attn_mask is not None:
        attn_mask = _four_mask(attn_mask, lead)
    out = _attention(
        query,
        key,
        value,
        get_variant(variant),
        options,
        impl=check_impl(impl),
        attn_mask=attn_mask,
        causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        generator=generator,
        offset=0,
    )
    return out.reshape(*lead, *out.shape[-2:])


def _leading(query: Tensor, key: Tensor, value: Tensor, gqa: bool) -> tuple[int, ...]:
    """The leading sizes of the output, by PyTorch's broadcasting."""
    if gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError("enable_gqa=True needs query, key and value with a dimension of heads.")
    cut = -3 if gqa else -2
    try:
        lead = torch.broadcast_shapes(*(t.shape[:cut] for t in (query, key, value)))
    except RuntimeError:
        sizes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        hint = "" if gqa else "; pass enable_gqa=True if fewer key heads are meant"
        raise ValueError(
            f"query, key and value must have leading sizes that broadcast, got {sizes}{hint}."
        ) from None
    return (*lead, query.shape[-3]) if gqa else tuple(lead)


def _four(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """`[..., rows, width]` broadcast to `lead` and brought to four dimensions."""
    full = tensor.expand(*lead, *tensor.shape[-2:])
    if len(lead) < 2:
        return full.view((1,) * (2 - len(lead)) + tuple(full.shape))
    return full.flatten(0, -4) if len(lead) > 2 else full


def _four_mask(mask: Any, lead: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"attn_mask must be a torch.Tensor, got {type(mask).__name__}.")
    if len(lead) <= 2 or mask.dim() <= 2:
        return mask
    try:
        return _four(mask, lead)
    except RuntimeError:
        raise ValueError(
            f"attn_mask must broadcast to {[*lead, 'q_len', 'kv_len']}, got {list(mask.shape)}."
        ) from None


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
            scores in float32 (inf for a row that sees no key), and, if there is dropout, the
            weights before it, negative where it drops them.
        dropout_p, softmax_scale, window_size, softcap, alibi_slopes, variant, impl, generator,
            options: as in `attention`.

    Returns:
        `[batch, q_len, heads, value_dim]`, or (that, softmax_lse, weights or None).

    Raises:
        ValueError: as `attention`.
    """
    query, key, value = _swap("q", q), _swap("k", k), _swap("v", v)
    call: dict[str, Any] = {
        "impl": impl,
        "causal": causal,
        "window_size": window_size,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "scale": softmax_scale,
        **options,
    }
    dropout: dict[str, Any] = {"dropout_p": dropout_p, "generator": generator}
    if not return_attn_probs:
        return attention(query, key, value, variant, **dropout, **call).transpose(1, 2)
    drops = dropout_p > 0
    out, *used, stats = attention(
        query, key, value, variant, return_weights=drops, return_stats=True, **dropout, **call
    )
    signed = None
    if drops:
        _, full = attention(query, key, value, variant, return_weights=True, **call)
        signed = torch.where((used[0] == 0) & (full != 0), -full, full)
    return out.transpose(1, 2), _flash_lse(stats), signed


def _flash_lse(stats: RowStats) -> Tensor:
    lse = stats.lse.float()
    return lse.masked_fill(lse.isneginf(), torch.inf)


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
    return result[0], _flash_lse(result[1]), None
