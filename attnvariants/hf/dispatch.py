"""The attention function registered with transformers: one for all models and variants.

Layouts: transformers hands over query `[batch, heads, q_len, head_dim]`, key and value
`[batch, kv_heads, kv_len, ...]` after rotary embedding and cache update, and wants
`[batch, q_len, heads, value_dim]` back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnvariants
from attnvariants.hf import masks
from attnvariants.hf.find import own_forward, source_of
from attnvariants.hf.holder import CHILD
from attnvariants.registry import Variant

PREVIOUS = "_attn_previous"
# Arguments that change the numbers and that no variant has a meaning for.
UNSUPPORTED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse key indices",
    "block_indices": "sparse block indices",
    "head_mask": "a head mask",
    "cache": "a paged cache (continuous batching)",
    "block_table": "a paged cache (continuous batching)",
}

# Called after each call of a patched module with (module, query, key, output, call): the output is
# [batch, heads, q_len, value_dim], `call` the keyword arguments of `api.iter_weights`.
observers: list[Callable[..., None]] = []

_collector: Any = None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a patched module by its variant, of any other by its previous operator.

    A mask tensor is the truth about what is visible; windows named in `kwargs` are hints that it
    already holds. Without a mask, causality is the argument's, else the module's.

    Returns:
        `[batch, q_len, heads, value_dim]`, and the weights if `output_attentions` is passed.

    Raises:
        ValueError: the model passes something that changes the numbers and has no meaning here.
    """
    holder = getattr(module, CHILD, None)
    if holder is None:
        kwargs.update(scaling=scaling, dropout=dropout)
        return previous_forward(module, query, key, value, attention_mask, kwargs)
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}, {meaning}, which attention variants "
                "cannot honour; unpatch the layer."
            )
    spec = holder(query)
    variant = attnvariants.get_variant(spec.variant)
    bias = kwargs.get("position_bias")
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    keep, causal = _visible(module, query, key, attention_mask, kwargs)
    kv_len = query.shape[2] if causal else _used_keys(variant, query, key, keep)
    if kv_len < key.shape[2]:
        key, value = key[:, :, :kv_len], value[:, :, :kv_len]
        keep, bias = _crop(keep, kv_len), _crop(bias, kv_len)
    if keep is not None and keep.is_floating_point() and keep.requires_grad:
        # A learned additive mask (Swin's relative positions): only `bias` has a gradient.
        bias = keep if bias is None else bias + keep
        keep = keep.detach() > torch.finfo(keep.dtype).min / 2
    want_weights = _wants_weights(kwargs)
    call = {
        "variant": spec.variant,
        "attn_mask": keep,
        "bias": bias,
        "causal": causal,
        "softcap": kwargs.get("softcap"),
        "scale": None if variant.own_scale else scaling,
        **spec.options,
    }
    result = attnvariants.attention(
        query,
        key,
        value,
        dropout_p=dropout,
        impl=spec.impl,
        return_weights=want_weights,
        **call,
    )
    out, weights = result if want_weights else (result, None)
    for observe in observers:
        observe(module, query, key, out, call)
    return out.transpose(1, 2).contiguous(), weights


def previous_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The operator a module had before its model was patched, with the mask it expects.

    A module that the patcher never saw (a second model built on the same config object) has no
    previous operator on record and gets the eager one of its own file, which is always exact.
    """
    forward, form = getattr(module, PREVIOUS, None) or (eager_of(type(module)), "float")
    if form == "float":
        if mask is None and query.shape[2] > 1 and masks.is_causal(module, kwargs):
            mask = masks.causal_keep(query.shape[2], key.shape[2], query.device)
        if mask is not None and mask.dtype == torch.bool:
            mask = masks.to_float(mask, query.dtype)
    return forward(module, query, key, value, mask, **kwargs)


def previous_of(module: nn.Module, implementation: str) -> tuple[Callable[..., Any], str]:
    """The function of an attention implementation and the form of mask it expects.

    Raises:
        ValueError: the implementation wants masks in a form that cannot be derived.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "eager":
        return eager_of(type(module)), "float"
    forms: dict[Any, str] = {sdpa_mask: "bool", eager_mask: "float"}
    form = forms.get(ALL_MASK_ATTENTION_FUNCTIONS.get(implementation))
    if form is None or implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"some layers would stay with {implementation!r} attention, whose masks cannot be "
            "shared with a variant; call model.set_attn_implementation('sdpa') first, or patch "
            "all layers."
        )
    return ALL_ATTENTION_FUNCTIONS[implementation], form


def eager_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention function that the forward of the class falls back to.

    Raises:
        ValueError: the file of the class has none.
    """
    function = own_forward(cls)
    named = re.search(r"\b(\w*eager_attention_forward)\b", source_of(function))
    for name in (named[1] if named else "", "eager_attention_forward"):
        if name in function.__globals__:
            return function.__globals__[name]
    raise ValueError(
        f"{cls.__module__} has no eager_attention_forward; call "
        "model.set_attn_implementation('sdpa') before patching."
    )


def _visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, bool]:
    """The mask as `attention` takes it, and whether the call is causal besides."""
    q_len, kv_len = query.shape[2], key.shape[2]
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            shape = list(getattr(mask, "shape", ()))
            raise ValueError(
                f"the attention mask must be a 4-D tensor, got {type(mask).__name__} of shape "
                f"{shape}; pass the model a 2-D padding mask or a 4-D mask."
            )
        if not mask.is_floating_point() and mask.dtype != torch.bool:
            mask = mask != 0
        return _crop(mask, kv_len), False
    causal = masks.is_causal(module, kwargs)
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is not None and cu_k is not None:
        if query.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q describes a packed batch of one row, got {query.shape[0]} rows; "
                "pass an attention mask instead."
            )
        return masks.document_keep(cu_q, cu_k, q_len, kv_len, causal), False
    if causal and q_len > kv_len:
        return masks.causal_keep(q_len, kv_len, query.device), False
    return None, causal and q_len > 1


def find_collector() -> None:
    """Look up where transformers >= 5 keeps what the running call is asked to return."""
    global _collector
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return
    _collector = getattr(output_capturing, "_active_collector", None)


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for attention weights; not all models pass the request on."""
    if kwargs.get("output_attentions"):
        return True
    asked = _collector.get() if _collector is not None else None
    return any("attentions" in name for name in asked or ())


def _crop(tensor: Tensor | None, kv_len: int) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[-1] <= kv_len else tensor[..., :kv_len]


def _used_keys(variant: Variant, query: Tensor, key: Tensor, keep: Tensor | None) -> int:
    """Number of keys up to the last one that any row sees.

    Static caches come with a tail of unfilled slots; variants that count positions from the end
    of the keys need it cut off.
    """
    kv_len = key.shape[2]
    if keep is None or keep.dtype != torch.bool or keep.shape[-1] != kv_len:
        return kv_len
    if query.shape[2] >= kv_len:
        return kv_len
    if torch.compiler.is_compiling():
        if any(option.from_config for option in variant.options.values()):
            raise ValueError(
                f"{variant.name} counts positions from the last key, which a compiled model with "
                "an explicit mask hides; run it without torch.compile."
            )
        return kv_len
    seen = keep.flatten(0, 2).any(0).nonzero()
    return int(seen[-1]) + 1 if seen.numel() else kv_len
