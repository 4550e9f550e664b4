"""The attention function registered with transformers: one for all models and variants.

Layouts: transformers hands over query `[batch, heads, q_len, head_dim]`, key and value
`[batch, kv_heads, kv_len, ...]` after rotary embedding and cache update, and wants
`[batch, q_len, heads, value_dim]` back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

import attnvariants
from attnvariants.context import readable
from attnvariants.hf import masks, penalties
from attnvariants.hf.eager import UNSUPPORTED, eager_of
from attnvariants.hf.find import own_config
from attnvariants.hf.holder import CHILD
from attnvariants.hf.lazy import LazyMask, View, to_float
from attnvariants.hf.names import attention_functions, mask_functions, masking, output_collector
from attnvariants.hf.sinks import attention_with_sinks
from attnvariants.hf.sparse import picked

PREVIOUS = "_attn_previous"
# Attribute of modules whose model's config records variants: why those could not be restored.
UNRESTORED = "_attn_unrestored"
# Attribute of modules that were looked at when their model was patched, and have no `PREVIOUS`.
SEEN = "_attn_seen"
# Attribute of the keys that a `RecurrentCache` hands out: the layer that attends with its state.
RECURRENT = "_attn_recurrent"
# Called after each call of a patched module with (module, query, key, output, call): the output is
# [batch, heads, q_len, value_dim], `call` the keyword arguments of `api.iter_weights`, and the
# learned "sinks" if the module has any.
observers: list[Callable[..., None]] = []
# The configs that patches have switched to our keys, by id: a copy of one is none of them.
switched: WeakValueDictionary[int, Any] = WeakValueDictionary()

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
    already holds. Without a mask, causality is the argument's, else the module's, as in sdpa
    attention; there is none if the module's attention was eager.

    Returns:
        `[batch, q_len, heads, value_dim]`, and the weights if `output_attentions` is passed.

    Raises:
        ValueError: the model passes something that changes the numbers and has no meaning here.
    """
    attention_mask = picked(module, query, key, attention_mask, kwargs)
    holder = getattr(module, CHILD, None)
    if holder is None:
        kwargs.update(scaling=scaling, dropout=dropout)
        return previous_forward(module, query, key, value, attention_mask, kwargs)
    _refuse_unknown(type(module), kwargs)
    spec = holder(query)
    variant = attnvariants.get_variant(spec.variant)
    hide = functools.partial(penalties.split_in, module, spec=spec)
    bias = kwargs.get("position_bias")
    if query.shape[0] == 1 and key.shape[0] > 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    if key.shape[1] != value.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    want_weights = _wants_weights(kwargs)
    layer = None if torch.compiler.is_compiling() else getattr(key, RECURRENT, None)
    if layer is not None:
        asked = {"output_attentions": want_weights, "diagnostics": observers, "dropout": dropout}
        asked |= {"bias": bias is not None, "softcap": kwargs.get("softcap")}
        if isinstance(attention_mask, Tensor) and attention_mask.is_floating_point():
            attention_mask = hide(attention_mask).keep
        scale = None if variant.own_scale else scaling
        out = layer.attend(query, key, value, attention_mask, spec, scale, asked)
        return out.transpose(1, 2).contiguous(), None
    sinks = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    plain = bias is None and sinks is None and not want_weights and not observers
    view = _visible(module, query, key, attention_mask, kwargs, plain, hide)
    keep = view.keep
    if bias is not None:
        keep, bias = _with_bias(keep, hide(bias), view.bias, view.keys)
    else:
        bias = view.bias
    if view.keys < key.shape[2]:
        # the slots of a static cache behind the queries are empty
        key, value = key[:, :, : view.keys], value[:, :, : view.keys]
    call = {
        "variant": spec.variant,
        "attn_mask": keep,
        "bias": bias,
        "causal": view.causal,
        "window_size": view.window,
        "softcap": kwargs.get("softcap"),
        "scale": None if variant.own_scale else scaling,
        "position": _position(query, key, keep) if view.read else None,
        **spec.options,
    }
    if view.documents is not None:
        return _packed(query, key, value, view.documents, dropout, spec.impl, call), None
    run = {"dropout_p": dropout, "impl": spec.impl, "return_weights": want_weights}
    if sinks is None:
        result = attnvariants.attention(query, key, value, **run, **call)
    else:
        result = attention_with_sinks(query, key, value, sinks, **run, **call)
        call["sinks"] = sinks
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

    A module of another model on the same config object, built before this one was patched, has
    none on record and gets the eager one of its own file, which is always exact.

    Raises:
        ValueError: the patcher never saw the module, nor its config.
    """
    if not (hasattr(module, PREVIOUS) or hasattr(module, SEEN)):
        config = own_config(module)
        if hasattr(module, UNRESTORED) or switched.get(id(config)) is not config:
            raise ValueError(unpatched(module))
    forward, form = getattr(module, PREVIOUS, None) or (eager_of(type(module)), "float")
    if isinstance(mask, LazyMask):
        mask = mask.as_asked(form)
    elif form == "float":
        if (
            not hasattr(module, PREVIOUS)
            and mask is None
            and query.shape[2] > 1
            and masks.is_causal(module, kwargs)
        ):
            mask = masks.causal_keep(query.shape[2], key.shape[2], query.device)
        if mask is not None and not mask.is_floating_point():
            mask = to_float(mask != 0, query.dtype)
    elif isinstance(mask, Tensor) and not mask.is_floating_point():
        mask = mask != 0
    return forward(module, query, key, value, mask, **kwargs)


def unpatched(module: nn.Module) -> str:
    """Why a module that no patch has seen computes nothing under our keys."""
    why = getattr(module, UNRESTORED, "")
    return (
        f"the attention implementation of this {type(module).__name__} is the one of patched "
        f"models and the module was never patched, so its variant is not known{why and ': '}"
        f"{why.rstrip('.')}; load its model with attnvariants.from_pretrained, or call "
        "model.set_attn_implementation('sdpa') and then attnvariants.patch."
    )


def previous_of(module: nn.Module, implementation: str) -> tuple[Callable[..., Any], str]:
    """The function of an attention implementation and the form of mask it expects.

    Raises:
        ValueError: the implementation wants masks in a form that cannot be derived.
    """
    if implementation == "eager":
        return eager_of(type(module)), "float"
    helpers, functions = masking(), attention_functions()
    forms: dict[Any, str] = {helpers.sdpa: "bool", helpers.eager: "float"}
    form = forms.get(mask_functions().get(implementation))
    if form is None or implementation not in functions:
        raise ValueError(
            f"some layers would stay with {implementation!r} attention, whose masks cannot be "
            "shared with a variant; call model.set_attn_implementation('sdpa') first, or patch "
            "all layers."
        )
    return functions[implementation], form


def _refuse_unknown(cls: type[nn.Module], kwargs: dict[str, Any]) -> None:
    """Raise if the call passes something that changes the numbers and has no meaning here."""
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{cls.__name__} passes {name}, {meaning}, which attention variants cannot "
                "honour; unpatch the layer."
            )


def _visible(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | LazyMask | None,
    kwargs: dict[str, Any],
    plain: bool,
    hide: Callable[[Tensor], penalties.Split],
) -> View:
    """What the call may see; documents are only given if it is plain, else they are in the mask.

    Args:
        hide: takes an additive mask apart.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        view = mask.view(q_len, kv_len)
        plain = plain and mask.batch == query.shape[0]
        if view is not None and _is_packed(view, kv_len, kwargs):
            return _documents(query, view, kwargs, plain)
        if view is not None and (view.documents is None or plain):
            return view
        mask = mask.tensor("bool")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            shape = list(getattr(mask, "shape", ()))
            raise ValueError(
                f"the attention mask must be a 4-D tensor, got {type(mask).__name__} of shape "
                f"{shape}; pass the model a 2-D padding mask or a 4-D mask."
            )
        if mask.is_floating_point():
            parts = hide(mask)
            mask, bias = parts.keep, _crop(parts.bias, kv_len)
            return View(kv_len, False, None, _crop(mask, kv_len), read=True, bias=bias)
        if mask.dtype != torch.bool:
            mask = mask != 0
        return View(kv_len, False, None, _crop(mask, kv_len), read=True)
    causal = masks.is_causal(module, kwargs)
    view = View(kv_len, causal, None, None)
    if _is_packed(view, kv_len, kwargs):
        return _documents(query, view, kwargs, plain)
    # eager attention sees everything then, whatever its module says
    causal = causal and getattr(module, PREVIOUS, (None, ""))[1] != "float"
    if causal and q_len > kv_len:
        return View(kv_len, False, None, masks.causal_keep(q_len, kv_len, query.device))
    causal = causal and q_len > 1
    return View(q_len if causal else kv_len, causal, None, None)


def _is_packed(view: View, kv_len: int, kwargs: dict[str, Any]) -> bool:
    """Whether the call says where documents begin and its mask does not."""
    if kwargs.get("cu_seq_lens_q") is None or kwargs.get("cu_seq_lens_k") is None:
        return False
    return view.documents is None and view.keep is None and view.keys == kv_len


def _with_bias(
    keep: Tensor | None, bias: penalties.Split, more: Tensor | None, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """What a call may see and what is added, of its mask and its position bias together.

    Args:
        keep: of the mask, bool, or float with -inf where keys are hidden.
        bias: the position bias, taken apart.
        more: what the mask adds besides, with a gradient.
    """
    adds = _crop(bias.bias, keys)
    shown = _crop(bias.keep, keys)
    if shown is not None and shown.is_floating_point():
        # added even where it is nothing, which some variants have no meaning for
        adds, shown = shown, None
    if more is not None:
        adds = more if adds is None else adds + more
    if shown is None or keep is None:
        return (keep if shown is None else shown), adds
    if keep.dtype == torch.bool:
        return keep & shown, adds
    return keep.masked_fill(~shown, -torch.inf), adds


def _documents(query: Tensor, view: View, kwargs: dict[str, Any], plain: bool) -> View:
    """The view, of documents that begin where the call says."""
    bounds = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes a packed batch of one row, got {query.shape[0]} rows; pass "
            "an attention mask instead."
        )
    if plain and all(readable(tensor) for tensor in bounds):
        return view._replace(documents=bounds)
    keep = masks.document_keep(*bounds, query.shape[2], view.keys, view.causal)
    return view._replace(causal=False, keep=keep)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    dropout: float,
    impl: str,
    call: dict[str, Any],
) -> Tensor:
    """Attention of documents one after another, `[batch, q_len, heads, value_dim]`."""
    call = {k: v for k, v in call.items() if k not in ("attn_mask", "bias", "position")}
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    out = attnvariants.attention_varlen(
        rows[0],
        rows[1],
        rows[2],
        bounds[0],
        bounds[1],
        dropout_p=dropout,
        impl=impl,
        **call,
    )
    # as eager attention's, of which some models take a view
    return out.unflatten(0, (query.shape[0], query.shape[2])).contiguous()


def find_collector() -> None:
    """Look up where transformers >= 5 keeps what the running call is asked to return."""
    global _collector
    _collector = output_collector()


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for attention weights; not all models pass the request on."""
    if kwargs.get("output_attentions"):
        return True
    asked = _collector.get() if _collector is not None else None
    return any("attentions" in name for name in asked or ())


def _crop(tensor: Tensor | None, kv_len: int) -> Tensor | None:
    return tensor if tensor is None or tensor.shape[-1] <= kv_len else tensor[..., :kv_len]


def _position(query: Tensor, key: Tensor, keep: Tensor | None) -> Tensor | None:
    """Where the first query stands among the keys if they end in a tail that no row sees.

    Such are the unfilled slots of a static cache. A tensor, because to read it would wait for the
    device and break a graph.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if keep is None or q_len >= kv_len or keep.shape[-1] != kv_len:
        return None
    if keep.is_floating_point():
        keep = keep > torch.finfo(keep.dtype).min / 2
    slots = torch.arange(kv_len, device=keep.device)
    last = (keep.flatten(0, 2).any(0) * slots).amax()
    return (last + 1 - q_len).clamp(min=0)
