"""Drop-in signatures: PyTorch's scaled_dot_product_attention and flash-attn's two functions."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import Tensor

from attnvariants import checks
from attnvariants.api import _attention, attention
from attnvariants.engines import check_impl
from attnvariants.paging import used_keys
from attnvariants.problem import RowStats
from attnvariants.registry import CALL_ARGUMENTS, Variant, get_variant
from attnvariants.scalars import check_flag, check_number
from attnvariants.varlen import attention_varlen

# Keyword arguments of flash-attn 3 and 4 and of the functions under flash-attn 2's own, and what
# to do without each.
_LATER = {
    **dict.fromkeys(("num_splits", "pack_gqa", "sm_margin"), ", it changes no result"),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), " and multiply by it what it scales"),
    **dict.fromkeys(("s_aux", "learnable_sink", "sinks"), "; its sinks are not computed here"),
    **dict.fromkeys(("score_mod", "mask_mod"), "; attention takes attn_mask and bias"),
    **dict.fromkeys(("return_lse", "return_softmax"), " and pass return_attn_probs"),
    **dict.fromkeys(("seqused_q", "qv", "attention_chunk", "out", "zero_tensors"), ""),
}


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
    chosen = get_variant(variant)
    _known_names(scaled_dot_product_attention, chosen, options)
    is_causal = check_flag("is_causal", is_causal)
    enable_gqa = check_flag("enable_gqa", enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None when is_causal=True; put causality in the mask.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if checks.dense(name, tensor).dim() < 2:
            raise ValueError(
                f"{name} must be a tensor of at least 2 dimensions, got shape {list(tensor.shape)}."
            )
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
        chosen,
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
    checks.dense("attn_mask", mask)
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
        softcap: cap c of the scores; 0 or less is off.
        deterministic: accepted; every engine here is.
        return_attn_probs: also return `softmax_lse` [batch, heads, q_len], the log-sum-exp of the
            scores in float32 (inf for a row that sees no key), and, if there is dropout, the
            weights before it, negative where it drops them.
        dropout_p, softmax_scale, window_size, alibi_slopes, variant, impl, generator, options: as
            in `attention`.

    Returns:
        `[batch, q_len, heads, value_dim]`, or (that, softmax_lse, weights or None).

    Raises:
        ValueError: as `attention`.
    """
    chosen = get_variant(variant)
    _known_names(flash_attn_func, chosen, options)
    checks.check_qkv(q, k, v, checks.FLASH)
    p = check_number("dropout_p", dropout_p, 0.0, 1.0)
    check_flag("deterministic", deterministic)
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    call: dict[str, Any] = {
        "impl": impl,
        "causal": causal,
        "window_size": window_size,
        "alibi_slopes": alibi_slopes,
        "softcap": _flash_cap(softcap),
        "scale": _flash_scale(softmax_scale),
        **options,
    }
    dropout: dict[str, Any] = {"dropout_p": p, "generator": generator}
    if not check_flag("return_attn_probs", return_attn_probs):
        return attention(query, key, value, chosen, **dropout, **call).transpose(1, 2)
    drops = p > 0
    out, *used, stats = attention(
        query, key, value, chosen, return_weights=drops, return_stats=True, **dropout, **call
    )
    signed = None
    if drops:
        _, full = attention(query, key, value, chosen, return_weights=True, **call)
        signed = torch.where((used[0] == 0) & (full != 0), -full, full)
    return out.transpose(1, 2), _flash_lse(stats), signed


def _flash_lse(stats: RowStats) -> Tensor:
    lse = stats.lse.float()
    return lse.masked_fill(lse.isneginf(), torch.inf)


def _flash_scale(softmax_scale: Any) -> float | None:
    return None if softmax_scale is None else check_number("softmax_scale", softmax_scale)


def _flash_cap(softcap: Any) -> float:
    """The cap; 0, which is off, for None and for what is negative, as flash-attn has it."""
    cap = 0.0 if softcap is None else check_number("softcap", softcap)
    return cap if cap > 0 else 0.0


def _known_names(function: Any, variant: Variant, options: dict[str, Any]) -> None:
    """Raise ValueError for keyword arguments that neither the function nor the variant has."""
    unknown = [name for name in options if name not in variant.options]
    if not unknown:
        return
    first, called = unknown[0], function.__name__
    if first in _LATER:
        raise ValueError(
            f"{called} has flash-attn 2's arguments, and {first} is one of later versions or of "
            f"its own internals; leave it out{_LATER[first]}."
        )
    own = [*inspect.signature(function).parameters][3:-1]
    takes = ", ".join([*own, *variant.options])
    near = difflib.get_close_matches(first, [*own, *variant.options], n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if not near and first in CALL_ARGUMENTS:
        hint = " (attention has it)"
    raise ValueError(f"{called} with {variant.name} takes {takes}; got {first!r}{hint}.")


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
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    variant: str | Variant = "softmax",
    impl: str = "auto",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Any:
    """flash-attn's `flash_attn_varlen_func` with a variant.

    Args:
        q: `[tokens_q, heads, head_dim]`; k and v `[tokens_k, kv_heads, ...]`, or with a block
            table pools of pages `[pages, page_size, kv_heads, ...]`.
        block_table: int32 or int64 `[sequences, blocks]`, the pages that hold each sequence's keys
            in order. They are copied into one row of tokens before the call.
        seqused_k: int32 or int64 `[sequences]`: only so many keys of each sequence count.
        leftpad_k: likewise, how many keys to leave out at the start of each.
        max_seqlen_q, max_seqlen_k: no sequence may be longer; None measures them.
        return_attn_probs: also return `softmax_lse` [heads, tokens_q] and None.
        The others are those of `attention_varlen` and `flash_attn_func`.

    Returns:
        `[tokens_q, heads, value_dim]`, or (that, softmax_lse, None).

    Raises:
        ValueError: as `attention_varlen`; or a block table names a page that is not in the pools
            or too few of them.
    """
    chosen = get_variant(variant)
    _known_names(flash_attn_varlen_func, chosen, options)
    check_flag("deterministic", deterministic)
    return_attn_probs = check_flag("return_attn_probs", return_attn_probs)
    if block_table is not None or seqused_k is not None or leftpad_k is not None:
        k, v, cu_seqlens_k = used_keys(k, v, cu_seqlens_k, block_table, seqused_k, leftpad_k)
    checks.check_qkv(q, k, v, checks.FLASH_PACKED)
    result = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        chosen,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=_flash_cap(softcap),
        scale=_flash_scale(softmax_scale),
        dropout_p=dropout_p,
        generator=generator,
        impl=impl,
        return_stats=return_attn_probs,
        **options,
    )
    if not return_attn_probs:
        return result
    return result[0], _flash_lse(result[1]), None
