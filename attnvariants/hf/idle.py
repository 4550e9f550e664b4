"""Variants that a model carries and does not compute: its implementation was set after patching.

transformers itself sends users there, with `config.output_attentions`. A forward hook on each
patched module says so then, and the report and the handle do.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

from attnvariants.hf import masks
from attnvariants.hf.find import Target, own_config
from attnvariants.hf.holder import CHILD, DISPATCH
from attnvariants.hf.names import implementation_of
from attnvariants.hf.softmax_hook import is_paused


def is_idle(module: nn.Module, config: Any = None) -> bool:
    """Whether a module carries a variant that its config's attention implementation leaves out.

    Args:
        module: the attention module.
        config: the config that it reads; by default looked up.
    """
    holder = module._modules.get(CHILD)
    # PEFT's wrapper of a holder answers for it
    if holder is None or getattr(holder, "backend", None) != DISPATCH:
        return False
    config = own_config(module) if config is None else config
    return implementation_of(config) not in masks.KEYS


def tell_when_idle(target: Target) -> None:
    """Have a patched module warn when it runs and its variant does not."""
    key = implementation_of(target.config)
    hook = functools.partial(_tell, config=target.config, key=key)
    target.module.register_forward_pre_hook(hook)


def tell_no_more(module: nn.Module) -> None:
    """Undo `tell_when_idle`."""
    hooks = module._forward_pre_hooks
    for number in [n for n, hook in hooks.items() if getattr(hook, "func", None) is _tell]:
        del hooks[number]


def _tell(module: nn.Module, args: Any, *, config: Any, key: str) -> None:
    if implementation_of(config) in masks.KEYS or torch.compiler.is_compiling() or is_paused():
        return
    if is_idle(module, config):
        warnings.warn(
            f"this {type(module).__name__} carries the variant "
            f"{getattr(module, CHILD).variant!r} and does not compute it: the model's attention "
            f"implementation was set to {implementation_of(config)!r} after patching. "
            f"model.set_attn_implementation({key!r}) brings it back, unpatch(model) takes it out. "
            "Attention weights need no other implementation: pass output_attentions=True to the "
            "call or to generate.",
            stacklevel=3,
        )
