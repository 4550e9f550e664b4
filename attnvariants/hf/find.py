"""Which modules of a model are attention that can be patched, and why the others cannot."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

DISPATCH = "ALL_ATTENTION_FUNCTIONS"
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
_ATTENTION_NAME = re.compile(r"attention|attn", re.I)
_BY_HAND = re.compile(r"softmax|scaled_dot_product_attention|baddbmm|multi_head_attention_forward")
_NOT_TEXT = re.compile(
    r"vision|visual|image|pixel|video|audio|speech|acoustic|codec|mimi|dac|qformer|depth|vq|sound"
)
_BY_HAND_REASON = (
    "it computes attention itself instead of calling transformers' attention interface, so a "
    "variant would be ignored or lose its mask"
)
_NUMERIC_ARGUMENTS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse key indices",
    "block_indices": "sparse block indices",
}


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

    @property
    def configs(self) -> list[Any]:
        """The configs that decide which operator the module calls and which mask it gets."""
        same = self.owner_config is None or self.owner_config is self.config
        return [self.config] if same else [self.config, self.owner_config]

    @property
    def heads(self) -> int | None:
        """Number of query heads, from the module, else from its config."""
        for owner in (self.module, self.config):
            for name in HEADS:
                value = getattr(owner, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return None


@functools.cache
def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def source_of(function: Callable[..., Any]) -> str:
    """Source of a function through its decorators, or an empty string."""
    return _source(inspect.unwrap(function))


def own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that does the work, following `super().forward` up the classes."""
    for base in cls.__mro__:
        if "forward" not in base.__dict__:
            continue
        source = source_of(base.__dict__["forward"])
        if DISPATCH in source or not re.search(r"super\([^)]*\)\.forward\(", source):
            return inspect.unwrap(base.__dict__["forward"])
    return cls.forward


def forward_source(cls: type[nn.Module]) -> str:
    """Source of `own_forward`, or an empty string."""
    return source_of(own_forward(cls))


def dispatches(cls: type[nn.Module]) -> bool:
    """Whether the class calls attention through transformers' attention interface."""
    return DISPATCH in forward_source(cls)


def attention_modules(model: nn.Module) -> list[Target]:
    """All attention modules of the model, those that can be patched and those that cannot."""
    configs = _configs_around(model)
    parts = _config_paths(getattr(model, "config", None))
    found: list[Target] = []
    for name, module in model.named_modules():
        cls, config = type(module), _own_config(module)
        calls = dispatches(cls)
        if calls:
            reason = _refusal(module, config)
        elif by_hand(module):
            reason = _BY_HAND_REASON
            if any(dispatches(base) for base in _module_bases(cls)):
                reason = "its class overrides forward and does not call the attention interface"
        else:
            continue
        around = configs(name)
        owner = around[0] if around else None
        chain = [config, *around] if config is not None else around
        path = next((parts[id(c)] for c in chain if id(c) in parts), "")
        found.append(
            Target(
                name=name,
                module=module,
                config=config if config is not None else owner,
                owner_config=owner,
                layer=_layer_index(name, module, len(found)),
                text=not _NOT_TEXT.search(path),
                dispatches=calls,
                reason=reason,
                apart=not calls and not _takes_mask(cls),
            )
        )
    if not any(target.text for target in found):
        for target in found:
            target.text = True
    return found


def by_hand(module: nn.Module) -> bool:
    """Whether a module looks like attention that is computed without the interface."""
    if not _ATTENTION_NAME.search(type(module).__name__):
        return False
    if not any(True for _ in module.parameters()):
        return False
    if any(dispatches(base) for base in _module_bases(type(module))):
        return True
    for child in module.modules():
        named = _ATTENTION_NAME.search(type(child).__name__)
        inner = child is not module and any(True for _ in child.parameters())
        if inner and (dispatches(type(child)) or (named and _computes(type(child)))):
            return False
    return _computes(type(module))


def _class_sources(cls: type) -> str:
    return "\n".join(_source(base) for base in _module_bases(cls))


def _takes_mask(cls: type[nn.Module]) -> bool:
    """Whether the class reads a mask that transformers makes for it."""
    return cls.__module__.split(".")[0] != "torch" and "mask" in _class_sources(cls)


def _computes(cls: type[nn.Module]) -> bool:
    return cls is nn.MultiheadAttention or bool(_BY_HAND.search(_class_sources(cls)))


def _module_bases(cls: type) -> Iterator[Any]:
    return (base for base in cls.__mro__ if issubclass(base, nn.Module) and base is not nn.Module)


def _own_config(module: nn.Module) -> Any:
    """The config in `self.config._attn_implementation` of the module's forward."""
    named = re.search(r"self\.(\w+)\._attn_implementation", forward_source(type(module)))
    return getattr(module, named[1] if named else "config", None)


def _refusal(module: nn.Module, config: Any) -> str:
    """Why a dispatching module cannot be patched; empty if it can."""
    own = module.__dict__.get("forward")
    hooked = hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__
    if own is not None and not hooked:
        by = getattr(own, "__module__", None) or getattr(type(own), "__module__", "?")
        return f"its forward was replaced on the instance (by {by}); undo that first"
    if config is None or not hasattr(config, "_attn_implementation"):
        return "it has no config that names its attention implementation"
    source = forward_source(type(module))
    for argument, meaning in _NUMERIC_ARGUMENTS.items():
        passed = re.search(rf"\b{argument}=(?:self\.(\w+)\b(?!\.|\())?", source)
        if passed and not (passed[1] and getattr(module, passed[1], 0) is None):
            return f"it passes {argument} ({meaning}), which variants cannot honour"
    rescaled = getattr(module, "scale_attn_by_inverse_layer_idx", False) or not getattr(
        module, "scale_attn_weights", True
    )
    if rescaled and not re.search(r"\bscaling=", source):
        return "this version of transformers does not pass its scale to the attention interface"
    return ""


def _layer_index(name: str, module: nn.Module, order: int) -> int:
    own = getattr(module, "layer_idx", None)
    if isinstance(own, int) and not isinstance(own, bool):
        return own
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[-1] if numbers else order


def _configs_around(model: nn.Module) -> Callable[[str], list[Any]]:
    """`name -> configs` of the transformers models around a module, nearest first."""
    from transformers import PreTrainedModel

    models = [
        (name, module.config)
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    ]

    def around(name: str) -> list[Any]:
        inside = [
            (len(outer), config)
            for outer, config in models
            if outer == "" or name == outer or name.startswith(outer + ".")
        ]
        return [config for _, config in sorted(inside, key=lambda pair: -pair[0])]

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
