"""Tiny random models of any transformers config: the same architecture at toy sizes.

A config is shrunk by the names of its fields: `RULES` say what a hidden size or a window becomes,
`tiny_table.OVERRIDES` hold what a model type needs besides.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnvariants.hf.architectures.tiny_table import HEADS, OVERRIDES, RULES, SEEDS
from attnvariants.hf.names import implementation_of, set_implementation

_TOKEN = re.compile(r"(token_id|token_index|_token_ids|bos_id|eos_id|im_\w+_id|image_patch_id)$")
_FIRST_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Per-layer lists whose distinct values decide which layers a tiny model keeps.
_KINDS = re.compile(
    r"(layer_types|layers_block_type|block_types|attention_types|no_rope_layers|indexer_types"
    r"|num_attention_heads_per_layer|attention_layers|attn_layers)$"
)
_ABSENT = object()
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
_FOREIGN = {"transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype"}


@dataclass(frozen=True)
class Sizes:
    """What a tiny model measures."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    inner: int = 96
    vocab: int = 128
    positions: int = 64
    window: int = 5
    image: int = 32
    patch: int = 8


def tiny_config(config: Any, sizes: Sizes | None = None) -> Any:
    """A config of the same class at toy sizes.

    Args:
        config: a transformers config, or its class.
        sizes: the sizes wanted.

    Raises:
        ValueError: the class cannot be instantiated, or not at such sizes.
    """
    sizes = sizes or Sizes()
    if isinstance(config, type):
        config = default_config(config)
    try:
        return type(config)(**_fields(config, sizes))
    except Exception as error:
        raise ValueError(
            f"no tiny {type(config).__name__} could be made ({type(error).__name__}: {error})."
        ) from error


def default_config(cls: type) -> Any:
    """The config that a class makes without arguments, or with what it cannot do without.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        return cls(**SEEDS.get(getattr(cls, "model_type", ""), {}))
    except Exception as error:
        raise ValueError(
            f"{cls.__name__} has no default values ({type(error).__name__}: {error})."
        ) from error


def _fields(config: Any, sizes: Sizes) -> dict[str, Any]:
    """Arguments for the config's class."""
    from transformers import PretrainedConfig

    kind = getattr(config, "model_type", "")
    given = OVERRIDES.get(kind, {})
    accepted = [
        name
        for name, parameter in inspect.signature(type(config).__init__).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name != "self"
        and name not in _FOREIGN
    ]
    values = {name: _value(config, name) for name in accepted}
    values = {name: value for name, value in values.items() if value is not _ABSENT}
    kept = _kept_layers(values, sizes)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in given:
            continue
        if isinstance(value, PretrainedConfig):
            below = value.to_dict()
            fields[name] = {**_fields(value, sizes), "model_type": below.get("model_type")}
        else:
            fields[name] = _shrunk(name, value, sizes, kept, values)
    _agree(config, fields, sizes)
    for name, value in given.items():
        fields[name] = value(sizes) if callable(value) else value
    return fields


def _agree(config: Any, fields: dict[str, Any], sizes: Sizes) -> None:
    """Mend fields that depend on one another."""
    if _value(config, "qk_rope_head_dim") is not _ABSENT and "num_key_value_heads" in fields:
        # latent attention has one latent for all heads
        fields["num_key_value_heads"] = fields.get("num_attention_heads", sizes.heads)
    kinds = fields.get("layer_types") or ()
    if fields.get("sliding_window", 0) is None and any("sliding" in str(kind) for kind in kinds):
        fields["sliding_window"] = sizes.window
    rope = fields.get("rope_parameters")
    if (
        not isinstance(rope, dict)
        or "rope_theta" not in rope
        or any(isinstance(item, dict) for item in rope.values())
    ):
        return
    source = inspect.getsourcefile(type(config)) or ""
    if "mrope_section" not in rope and "mrope_section" in _modeling_source(source):
        share = rope.get("partial_rotary_factor") or 1.0
        rope["mrope_section"] = _sections(int(sizes.head_dim * share) // 2, 3)


@functools.cache
def _modeling_source(path: str) -> str:
    """Text of the file beside a config's that defines its models."""
    beside = Path(path.replace("configuration_", "modeling_"))
    return beside.read_text(encoding="utf-8") if beside.is_file() else ""


def _value(config: Any, name: str) -> Any:
    """A field as it was given; configs whose layers differ refuse to name one value for all."""
    if name == "per_layer_config":
        return _ABSENT
    try:
        return getattr(config, name, _ABSENT)
    except RuntimeError:
        return vars(config).get(name, _ABSENT)


def _depth(values: Mapping[str, Any]) -> int:
    for name in _LAYERS:
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _kept_layers(values: Mapping[str, Any], sizes: Sizes) -> list[int]:
    """Indices of the layers to keep: one of each kind, and as many as wanted at least."""
    depth = _depth(values)
    if not depth:
        return []
    lists = [
        value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and _KINDS.search(name)
    ]
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for layer in range(depth):
        key = tuple(str(value[layer]) for value in lists)
        if key not in seen:
            seen.add(key)
            kept.append(layer)
    rest = [layer for layer in range(depth) if layer not in kept]
    return sorted(kept + rest[: max(sizes.layers - len(kept), 0)])


def _shrunk(name: str, value: Any, sizes: Sizes, kept: list[int], values: Mapping[str, Any]) -> Any:
    """The value of a field in a tiny model."""
    if value is None:
        # some classes expect a number here though it may be left out
        return {"head_dim": sizes.head_dim, "num_key_value_heads": sizes.kv_heads}.get(name)
    if isinstance(value, (bool, str)):
        return value
    if _TOKEN.search(name):
        return _token(name, value)
    depth = _depth(values)
    if name in _LAYERS and value == depth and kept:
        return len(kept)
    if isinstance(value, (list, tuple)):
        if kept and list(value) == list(range(depth)):
            return type(value)(range(len(kept)))
        if depth > 1 and len(value) == depth and kept:
            value = [value[layer] for layer in kept]
        elif value and all(type(item) is int for item in value) and name.endswith("layers"):
            return type(value)(sorted({item for item in value if 0 <= item < max(len(kept), 1)}))
        return type(value)(_shrunk(name, item, sizes, [], {}) for item in value)
    if isinstance(value, Mapping):
        return _shrunk_mapping(name, value, sizes, values)
    if isinstance(value, int):
        for pattern, rule in RULES:
            if re.search(pattern, name):
                small = rule(sizes) if callable(rule) else rule
                if small <= value:
                    return small
                # heads must divide a width, which is a multiple of powers of two
                return 1 << (value.bit_length() - 1) if pattern == HEADS and value else value
    return value


def _shrunk_mapping(
    name: str, value: Mapping[str, Any], sizes: Sizes, values: Mapping[str, Any]
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            made[key] = _shrunk_mapping(key, item, sizes, values)
        elif key == "mrope_section" and isinstance(item, (list, tuple)):
            share = value.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
            made[key] = _sections(int(sizes.head_dim * share) // 2, len(item))
        elif key in ("short_factor", "long_factor") and isinstance(item, (list, tuple)):
            made[key] = list(item[: sizes.head_dim // 2])
        elif key == "original_max_position_embeddings":
            made[key] = sizes.positions // 2
        elif "rope" in name:
            made[key] = item
        else:
            made[key] = _shrunk(str(key), item, sizes, [], {})
    return made


def _sections(total: int, parts: int) -> list[int]:
    """`total` in nearly equal parts, larger ones first."""
    return [total // parts + (1 if part < total % parts else 0) for part in range(parts)]


def _token(name: str, value: Any) -> Any:
    """A small id of a special token; the same for the same name in every part of a model."""
    if isinstance(value, (list, tuple)):
        return [100 + position for position in range(len(value))]
    if not isinstance(value, int) or value < 0:
        return value
    if name in _FIRST_TOKENS:
        return _FIRST_TOKENS[name]
    if name in ("decoder_start_token_id", "forced_eos_token_id", "eod_token_id", "sep_token_id"):
        return 2
    return 90 + sum(ord(letter) * (place % 7 + 1) for place, letter in enumerate(name)) % 37


def model_class(config: Any) -> type[nn.Module]:
    """The model that transformers makes of a config, the one without a head if there is one.

    Raises:
        ValueError: there is none.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto

    cls = config if isinstance(config, type) else type(config)
    names = ["MODEL_MAPPING", *sorted(dir(modeling_auto))]
    for name in names:
        if not re.fullmatch(r"MODEL_\w*MAPPING", name):
            continue
        mapping = getattr(modeling_auto, name)
        try:
            found = mapping[cls]
        except (KeyError, ValueError, AttributeError, ImportError):
            continue
        found = found[0] if isinstance(found, (list, tuple)) else found
        if isinstance(found, type):
            return found
    for found in _classes_beside(cls):
        if issubclass(found, PreTrainedModel):
            return found
    raise ValueError(f"transformers has no model for {cls.__name__}.")


def _classes_beside(cls: type) -> Iterator[type]:
    """Models in the module next to a config's that name the config as theirs, shortest first."""
    import importlib

    try:
        module = importlib.import_module(cls.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return
    found = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and getattr(thing, "config_class", None) is cls
        and "config_class" in thing.__dict__ | {"config_class": 1}
        and not thing.__name__.endswith("PreTrainedModel")
    ]
    yield from sorted(found, key=lambda thing: len(thing.__name__))


def tiny_model(config: Any, cls: type[nn.Module] | None = None, seed: int = 0) -> nn.Module:
    """A random model in evaluation mode whose attention is far from uniform, all eager.

    Raises:
        ValueError: the model cannot be built from the config.
    """
    cls = cls or model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            build = getattr(cls, "_from_config", cls)
            model = build(config, **({"attn_implementation": "eager"} if build is not cls else {}))
        except Exception as error:
            raise ValueError(
                f"{cls.__name__} cannot be built from its tiny config "
                f"({type(error).__name__}: {error})."
            ) from error
        randomise(model)
    make_eager(model)
    return model.eval()


def make_eager(model: nn.Module) -> None:
    """Let every part of a model compute attention by the code of its own file."""
    for module in model.modules():
        config = getattr(module, "config", None)
        now = implementation_of(config)
        if config is not None and now not in (None, "eager"):
            set_implementation(config, "eager")


def randomise(model: nn.Module) -> None:
    """Give all weights values of a size that makes attention peaked and outputs of order one."""
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta or not (parameter.is_floating_point() and parameter.numel()):
                    continue
                if "sink" in name or isinstance(module, nn.Embedding):
                    parameter.normal_()
                elif parameter.dim() >= 2:
                    fan = math.prod(parameter.shape[1:])
                    parameter.normal_(std=min(1.3 / math.sqrt(fan), 0.5))
                elif name == "bias":
                    parameter.normal_(std=0.1)
                elif name == "weight":
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
