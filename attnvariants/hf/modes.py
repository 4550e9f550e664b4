"""How the self-test of a patch runs a model: quietly, unpatched, with softmax, or watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attnvariants.hf import softmax_hook
from attnvariants.hf.holder import AttnVariant
from attnvariants.hf.names import implementation_of, set_implementation


@contextmanager
def softmax(root: nn.Module) -> Iterator[None]:
    """Softmax in place of every variant, for as long as it takes."""
    holders = [module for module in root.modules() if isinstance(module, AttnVariant)]
    before = [(holder.variant, holder.options, holder.learned, holder.impl) for holder in holders]
    try:
        for holder in holders:
            holder.variant, holder.options, holder.learned, holder.impl = "softmax", {}, (), "auto"
        yield
    finally:
        for holder, values in zip(holders, before, strict=True):
            holder.variant, holder.options, holder.learned, holder.impl = values


@contextmanager
def quiet(root: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are restored."""
    modes = [(module, module.training) for module in root.modules()]
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        root.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def watching(modules: dict[str, nn.Module]) -> Iterator[set[str]]:
    """The names of the modules that were called inside."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in modules.items()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def unpatched(configs: list[tuple[Any, str]]) -> Iterator[None]:
    """The model with its previous operators, for as long as it takes."""
    ours = [(config, implementation_of(config)) for config, _ in configs]
    try:
        for config, previous in configs:
            set_implementation(config, previous)
        with softmax_hook.paused():
            yield
    finally:
        for config, now in ours:
            set_implementation(config, now)
