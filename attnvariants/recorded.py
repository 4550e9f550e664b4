"""Sees models that others build from a config which records variants, or put adapters into.

transformers has no hook where a model is complete and its weights are not there yet, so the one of
torch for registered modules, which every child of every module passes, looks for its models. It
costs a few look-ups and replaces no method of another library.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Name of the record in a config, and how the attention implementations of patched models begin.
RECORD = "attn_variants"
KEY = "attnvariants"
_watching: list[Any] = []


def watch() -> None:
    """Look at every model that is built in this process from now on; once is enough."""
    if not _watching:
        _watching.append(nn.modules.module.register_module_module_registration_hook(_look))


def _look(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if parent._modules or child is None:
        return
    if "config" in parent.__dict__ and hasattr(type(parent), "post_init"):
        from attnvariants.hf.construct import begin

        begin(parent)
    elif name == "base_model" and type(parent).__module__.split(".")[0] == "peft":
        from attnvariants.hf.adapters import begin_adapter

        begin_adapter(parent, child)
