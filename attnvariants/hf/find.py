"""Which modules of a model are attention that can be patched, and why the others cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnvariants.hf.eager import replaced_by, unknown_reads
from attnvariants.hf.names import IMPLEMENTATION, has_implementation
from attnvariants.hf.source import dispatches, forward_source, text_of
from attnvariants.hf.sparse import NAMES as PICKS
from attnvariants.hf.sparse import understood

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
_ATTENTION_NAME = re.compile(r"attention|attn", re.I)
_BY_HAND = re.compile(
    r"[sS]oftmax|scaled_dot_product_attention|baddbmm|multi_head_attention_forward"
)
_NOT_TEXT = re.compile(
    r"vision|visual|image|pixel|video|audio|speech|acoustic|codec|mimi|dac|qformer|depth|vq|sound"
)
_BY_HAND_REASON = (
    "it computes attention itself instead of calling transformers' attention interface, so a "
    "variant would be ignored or lose its mask"
)


@dataclass
class Target:
    """An attention module of a model.

    Attributes:
        name: its qualified name.
        module: the module.
        config: the config it reads its attention implementation from.
        owner_config: the config of the nearest model around it, which builds its mask.
        layer: its layer index.
        text: whether it belongs to the text part of the model.
        dispatches: whether it calls transformers' attention interface.
        reason: why it cannot be patched; empty if it can.
        apart: computes attention by itself, without a mask, and is left alone.
        eager_only: its model was written for eager attention alone.
        sources: names of the Python modules that hold its code and that of its model.
    """

    name: str
    module: nn.Module
    config: Any
    owner_config: Any
    layer: int
    text: bool
    dispatches: bool
    reason: str = ""
    apart: bool = False
    eager_only: bool = False
    sources: tuple[str, ...] = ()

    @property
    def configs(self) -> list[Any]:
        """The configs that decide which operator the module calls and which mask it gets."""
        same = self.owner_config is None or self.owner_config is self.config
        return [self.config] if same else [self.config, self.owner_config]

    @property
    def harmed(self) -> bool:
        """Whether it cannot stay as it is beside variants on its config."""
        by_hand = not self.dispatches and not self.apart
        return by_hand and IMPLEMENTATION in _class_sources(type(self.module))

    @property
    def heads(self) -> int | None:
        """Number of query heads, from the module, else from its config."""
        for owner in (self.module, self.config):
            for name in HEADS:
                value = getattr(owner, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return None


def attention_modules(model: nn.Module) -> list[Target]:
    """All attention modules of the model, those that can be patched and those that cannot."""
    models_around = _models_around(model)
    parts = _config_paths(getattr(model, "config", None))
    found: list[Target] = []
    for name, module in model.named_modules():
        cls, config = type(module), own_config(module)
        calls = dispatches(cls)
        package = replaced_by(cls) if _ATTENTION_NAME.search(cls.__name__) else ""
        if package:
            reason = f"the forward of its class was replaced (by {package}); undo that first"
        elif calls:
            reason = _refusal(module, config)
        elif by_hand(module):
            reason = _BY_HAND_REASON
            if any(dispatches(base) for base in _module_bases(cls)):
                reason = "its class overrides forward and does not call the attention interface"
        else:
            continue
        models = models_around(name)
        around = [outer.config for outer in models]
        owner = around[0] if around else None
        chain = [config, *around] if config is not None else around
        part = next((c for c in chain if id(c) in parts), None)
        found.append(
            Target(
                name=name,
                module=module,
                config=config if config is not None else owner,
                owner_config=owner,
                layer=_layer_index(name, module, len(found)),
                text=part is None or _is_text(parts[id(part)], part),
                dispatches=calls,
                reason=reason,
                apart=not calls and not _takes_mask(cls),
                eager_only=bool(models) and not getattr(models[0], "_supports_sdpa", True),
                sources=tuple({cls.__module__, *(type(outer).__module__ for outer in models)}),
            )
        )
    if not any(target.text for target in found):
        for target in found:
            target.text = True
    return found


def _is_text(path: str, config: Any) -> bool:
    """Whether a config, found at a path in the model's, is one of text."""
    kind = str(getattr(config, "model_type", "")) if path and "text" not in path else ""
    return not _NOT_TEXT.search(f"{path} {kind}")


def by_hand(module: nn.Module) -> bool:
    """Whether a module looks like attention that is computed without the interface."""
    if not _named_attention(type(module)):
        return False
    if not any(True for _ in module.parameters()):
        return False
    if any(dispatches(base) for base in _module_bases(type(module))):
        return True
    for child in module.modules():
        named = _named_attention(type(child))
        inner = child is not module and any(True for _ in child.parameters())
        if inner and (dispatches(type(child)) or (named and _computes(type(child)))):
            return False
    return _computes(type(module))


def _named_attention(cls: type) -> bool:
    return any(_ATTENTION_NAME.search(base.__name__) for base in _module_bases(cls))


def _class_sources(cls: type) -> str:
    return "\n".join(text_of(base) for base in _module_bases(cls))


def _takes_mask(cls: type[nn.Module]) -> bool:
    """Whether the class reads a mask that transformers makes for it."""
    return cls.__module__.split(".")[0] != "torch" and "mask" in _class_sources(cls)


def _computes(cls: type[nn.Module]) -> bool:
    return cls is nn.MultiheadAttention or bool(_BY_HAND.search(_class_sources(cls)))


def _module_bases(cls: type) -> Iterator[Any]:
    return (base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)


def own_config(module: nn.Module) -> Any:
    """The config whose implementation the module's forward reads, `config` where it reads none."""
    named = re.search(rf"self\.(\w+)\.{IMPLEMENTATION}", forward_source(type(module)))
    return getattr(module, named[1] if named else "config", None)


def replaced_forward(module: nn.Module) -> str:
    """That another library replaced the forward of a module, or an empty string."""
    own = module.__dict__.get("forward")
    hooked = hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__
    if own is None or hooked:
        return ""
    by = getattr(own, "__module__", None) or getattr(type(own), "__module__", "?")
    return f"its forward was replaced on the instance (by {by}); undo that first"


def _refusal(module: nn.Module, config: Any) -> str:
    """Why a dispatching module cannot be patched; empty if it can."""
    replaced = replaced_forward(module)
    if replaced:
        return replaced
    if config is None or not has_implementation(config):
        return "it has no config that names its attention implementation"
    source = forward_source(type(module))
    if any(passes(module, name) for name in PICKS) and not understood(source):
        return "it picks keys for each query in a way that this package does not know"
    unknown = unknown_reads(module)
    if unknown:
        return (
            f"its own eager attention reads {', '.join(unknown)}, which this package does not "
            "know and might drop"
        )
    rescaled = getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(
        module, "scale_attn_weights", True
    )
    if rescaled and not re.search(r"\bscaling=", source):
        return "this version of transformers does not pass its scale to the attention interface"
    return ""


def passes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward passes an argument to attention that is not always None."""
    source = forward_source(type(module))
    passed = re.search(rf"\b{argument}=(?:self\.(\w+)\b(?!\.|\())?", source)
    if passed is None:
        return False
    return not (passed[1] and getattr(module, passed[1], 0) is None)


def _layer_index(name: str, module: nn.Module, order: int) -> int:
    own = getattr(module, "layer_idx", None)
    if isinstance(own, int) and not isinstance(own, bool):
        return own
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[-1] if numbers else order


def _models_around(model: nn.Module) -> Callable[[str], list[Any]]:
    """`name -> transformers models` around a module, nearest first."""
    from transformers import PreTrainedModel

    models = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]

    def around(name: str) -> list[Any]:
        inside = [
            (len(outer), module)
            for outer, module in models
            if outer == "" or name == outer or name.startswith(outer + ".")
        ]
        return [module for _, module in sorted(inside, key=lambda pair: -pair[0])]

    return around


def _config_paths(config: Any, path: str = "") -> dict[int, str]:
    """`id(config) -> dotted name` of a config and of all configs below it."""
    if config is None:
        return {}
    paths = {id(config): path}
    for key in getattr(config, "sub_configs", None) or {}:
        below = getattr(config, key, None)
        if below is not None and not isinstance(below, dict):
            for found, name in _config_paths(below, f"{path}.{key}").items():
                paths.setdefault(found, name)
    return paths
