"""From the arguments of `patch` to checked holders, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnvariants.hf.find import Target, passes
from attnvariants.hf.holder import AttnVariant
from attnvariants.hf.sinks import why_not
from attnvariants.registry import Variant, get_variant, list_variants

# Names of modules whose queries and keys come from different sequences.
_CROSSES = re.compile(r"encoder_attn|cross_?att|encdec|enc_dec", re.I)


@dataclass(frozen=True)
class Request:
    """A variant with its options for some layers."""

    variant: Variant
    layers: Any
    options: dict[str, Any]
    preset: str | None
    train_length: int | None


def requests_of(
    variant: Any,
    layers: Any,
    options: dict[str, Any],
    preset: str | None,
    train_length: int | None,
) -> list[Request]:
    """One request, or one for each key of a mapping of layers to variants.

    Raises:
        ValueError: an unknown variant, option or preset, or arguments that exclude each other.
    """
    if train_length is not None:
        whole = isinstance(train_length, int) and not isinstance(train_length, bool)
        if not whole or train_length < 1:
            raise ValueError(f"train_length must be a positive integer, got {train_length!r}.")
        if preset is None:
            raise ValueError("train_length only sets the values of a preset; pass preset= too.")
    if not isinstance(variant, Mapping):
        return [_request(variant, layers, options, preset, train_length)]
    if layers is not None or options:
        extra = "layers" if layers is not None else ", ".join(sorted(options))
        raise ValueError(
            f"a mapping of layers to variants holds everything itself, got {extra} besides; give "
            "options as {layers: (variant, options)}."
        )
    if not variant:
        raise ValueError("the mapping of layers to variants is empty.")
    requests = []
    for key, value in variant.items():
        name, own = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        if not isinstance(own, Mapping):
            raise ValueError(
                f"the mapping's value for {key!r} must be a variant or (variant, options), got "
                f"{value!r}."
            )
        requests.append(_request(name, key, dict(own), preset, train_length))
    return requests


def _request(
    variant: Any, layers: Any, options: dict[str, Any], preset: str | None, length: int | None
) -> Request:
    found = get_variant(variant)
    if found.name not in list_variants() or get_variant(found.name) is not found:
        raise ValueError(
            f"the variant {found.name!r} is not registered under its name, so a patched model "
            "could not be saved; call attnvariants.register first."
        )
    if preset is not None and preset not in found.presets:
        has = f"its presets are {', '.join(found.presets)}" if found.presets else "it has none"
        raise ValueError(f"{found.name} has no preset {preset!r}; {has}.")
    found.resolve(options)
    for name, value in options.items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(f"{found.name}'s {name} holds NaN or infinity; give finite values.")
    return Request(found, layers, dict(options), preset, length)


def build_holder(target: Target, request: Request, impl: str, trainable: bool) -> AttnVariant:
    """The holder of one attention module, checked against the module and its config.

    Raises:
        ValueError: the module uses a feature that the variant cannot mean, the number of heads
            is unknown or another than a tensor's, the module is offloaded, or a preset needs a
            length.
    """
    variant = request.variant
    _check_features(target, variant)
    options = dict(request.options)
    for name, option in variant.options.items():
        if option.from_config and options.get(name) is None:
            value = getattr(target.config, option.from_config, None)
            if value is not None:
                options[name] = value
    values = {name: variant.options[name].default for name in variant.default_learned}
    if request.preset is not None:
        values.update(variant.presets[request.preset](_length(target, request)))
    values.update({name: options.pop(name) for name in variant.learned if name in options})
    variant.resolve({**options, **values})
    learned, device = _learned(target, variant, values)
    return AttnVariant(variant.name, impl, options, learned, trainable, device)


def _learned(
    target: Target, variant: Variant, values: dict[str, Any]
) -> tuple[dict[str, Tensor], torch.device | None]:
    """Initial `[heads]` tensors in the dtype of the module's parameters, and their device."""
    if not values:
        return {}, None
    heads = target.heads
    if heads is None:
        raise ValueError(
            f"{target.name} does not tell its number of heads, which {variant.name}'s learned "
            f"{', '.join(values)} need; patch other layers."
        )
    like = next((p for p in target.module.parameters() if p.is_floating_point()), None)
    dtype, device = (torch.float32, None) if like is None else (like.dtype, like.device)
    if like is not None and like.is_meta and _offloaded(target):
        raise ValueError(
            f"{target.name} is offloaded, so {variant.name}'s learned {', '.join(values)} would "
            "have no values; patch the model before dispatching it to devices."
        )
    learned = {}
    for name, value in values.items():
        given = isinstance(value, Tensor)
        # not in the default dtype, which may be a narrow one
        tensor = value.detach() if given else torch.tensor(value, dtype=torch.float64, device="cpu")
        if tensor.numel() not in (1, heads):
            raise ValueError(
                f"{variant.name}'s {name} must be a number or [{heads}] values, one for each head "
                f"of {target.name}, got shape {list(tensor.shape)}."
            )
        tensor = tensor.to(dtype=dtype, device="cpu").reshape(-1).expand(heads).clone()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{variant.name}'s {name} does not fit into {dtype}: {value}.")
        learned[name] = tensor
    return learned, device


def _offloaded(target: Target) -> bool:
    return any(hasattr(module, "_hf_hook") for module in target.module.modules())


def _length(target: Target, request: Request) -> int:
    length = request.train_length
    if length is None:
        length = getattr(target.config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ValueError(
            f"the preset {request.preset!r} needs the length the model was trained for and its "
            "config has no max_position_embeddings; pass train_length."
        )
    return length


def _check_features(target: Target, variant: Variant) -> None:
    module = target.module
    where = f"{type(module).__name__} ({target.name})"
    biased = passes(module, "position_bias")
    if "max_len" in variant.options and _CROSSES.search(target.name):
        raise ValueError(
            f"{variant.name} cannot replace the attention of {where}, between two sequences: it "
            "weighs by distance, which they have none of; patch the other layers, with layers=."
        )
    for used, feature in (
        (passes(module, "softcap") and _cap(target), "softcap"),
        (biased, "bias"),
    ):
        if used and feature in variant.refuses:
            raise ValueError(
                f"{variant.name} cannot replace the attention of {where}, which uses a {feature}: "
                f"{variant.refuses[feature]}."
            )
    if passes(module, "s_aux") or passes(module, "sinks"):
        reason = why_not(variant, biased)
        if reason:
            raise ValueError(f"{variant.name} cannot replace the attention of {where}: {reason}.")


def _cap(target: Target) -> bool:
    names = ("attn_logit_softcapping", "softcap", "logit_softcap")
    return any(getattr(owner, name, None) for owner in (target.module, target.config)
               for name in names)  # fmt: skip
