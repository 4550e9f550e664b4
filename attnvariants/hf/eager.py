"""The eager attention function of a model's file: what it reads, and who replaced what."""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from attnvariants.hf.names import EAGER, PAGED, REGISTRY
from attnvariants.hf.source import forward_source, own_forward, source_of

# Arguments that change the numbers and that no variant has a meaning for.
UNSUPPORTED = {
    "head_mask": "a head mask",
    **dict.fromkeys(PAGED, "a paged cache (continuous batching)"),
}
# What eager functions read besides query, key, value and mask, and what becomes of it: honoured,
# refused at the call, or held by the mask.
_ARGUMENTS = {
    *("scaling", "dropout", "position_bias", "softcap", "sinks", "s_aux"),
    *("sliding_window", "is_causal", "output_attentions", *UNSUPPORTED),
}
# What they read of the module that is honoured, or held by other arguments.
_ATTRIBUTES = {
    *("num_key_value_groups", "training", "head_dim", "sinks", "is_causal"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "layer_idx"),
    *("is_cross_attention", "attn_dropout", "bias", "position_embedding_type"),
}


def eager_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The eager attention function that the forward of the class falls back to.

    Raises:
        ValueError: the file of the class has none.
    """
    function = own_forward(cls)
    named = re.search(rf"\b(\w*{EAGER})\b", source_of(function))
    for name in (named[1] if named else "", EAGER):
        if name in function.__globals__:
            return function.__globals__[name]
    raise ValueError(
        f"{cls.__module__} has no {EAGER}; call "
        "model.set_attn_implementation('sdpa') before patching."
    )


def unknown_reads(module: nn.Module) -> list[str]:
    """What the eager attention of a module's file reads that this package knows nothing of."""
    try:
        arguments, attributes = _reads(eager_of(type(module)))
    except ValueError:
        return []
    unknown = [name for name in arguments if name not in _ARGUMENTS]
    unknown += [
        f"self.{name}"
        for name in attributes
        if name not in _ATTRIBUTES and getattr(module, name, None) is not None
    ]
    sinks = "sinks" in attributes and getattr(module, "sinks", None) is not None
    if sinks and "s_aux=" not in forward_source(type(module)):
        unknown.append("self.sinks")
    return unknown


@functools.cache
def _reads(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keyword arguments and attributes of the module that an eager function reads."""
    try:
        tree = ast.parse(textwrap.dedent(source_of(function))).body[0]
    except (SyntaxError, IndexError):
        return (), ()
    if not isinstance(tree, ast.FunctionDef):
        return (), ()
    names = [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)]
    more = tree.args.kwarg.arg if tree.args.kwarg else None
    arguments, attributes = names[5:], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is(node.value, names[:1]):
            attributes.append(node.attr)
        elif isinstance(node, ast.Subscript) and _is(node.value, [more]):
            arguments.extend(_strings([node.slice]))
        elif isinstance(node, ast.Call):
            owner = getattr(node.func, "value", None)
            if _is(owner, [more]):
                arguments.extend(_strings(node.args[:1]))
            elif _is(node.func, ["getattr"]) and node.args and _is(node.args[0], names[:1]):
                attributes.extend(_strings(node.args[1:2]))
    return tuple(sorted(set(arguments))), tuple(sorted(set(attributes)))


def _is(node: Any, names: list[Any]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _strings(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def replaced_by(cls: type[nn.Module]) -> str:
    """The package that replaced the forward of a class, or what its forward calls; else empty.

    Functions of transformers and torch are at home everywhere: they are decorators.
    """
    for base in cls.__mro__:
        forward = base.__dict__.get("forward")
        if forward is None or not issubclass(base, nn.Module) or base is nn.Module:
            continue
        home = {base.__module__.split(".")[0], "transformers", "torch"}
        owners = [getattr(forward, "__globals__", {}).get("__name__", "")]
        used = getattr(own_forward(base), "__globals__", {})
        if REGISTRY in forward_source(base):
            owners.append(type(used.get(REGISTRY)).__module__)
            owners.append(_defined_in(used.get(EAGER)))
        for owner in owners:
            package = owner.split(".")[0]
            if package and package not in home and package != "builtins":
                return owner
    return ""


def _defined_in(function: Any) -> str:
    return getattr(function, "__globals__", {}).get("__name__", "")
