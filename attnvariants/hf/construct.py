"""Models that others build from a config with a record: their variants are restored, or it is said.

Trainers load a reference model with the attention implementation of the policy, which is a key of
ours, and `Model(config)` of a patched model's config names one too. Such a model is patched as its
config records when its `post_init` is over: before the weights come, if any do.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from attnvariants.hf import masks
from attnvariants.hf.dispatch import PREVIOUS, UNRESTORED
from attnvariants.hf.find import attention_modules
from attnvariants.hf.holder import HOOK, AttnVariant
from attnvariants.hf.loading import is_loading
from attnvariants.hf.names import (
    default_implementation,
    has_implementation,
    implementation_of,
    set_implementation,
)
from attnvariants.hf.record import plain_reload, read_record, resolve_names, restore
from attnvariants.hf.state import ATTRIBUTE, remove, state_of
from attnvariants.recorded import RECORD

_WHERE = "the config"
# A config that models share does not name what they compute while one of them is patched by it.
_changing = threading.RLock()


def begin(model: nn.Module) -> None:
    """Have a transformers model that begins to be built come by again when it is complete."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or is_loading():
        return
    config = model.config
    with _changing:
        asks = implementation_of(config) in masks.KEYS
        if asks or config.__dict__.get(RECORD) is not None:
            model.post_init = functools.partial(_complete, model)  # type: ignore[method-assign]


def _complete(model: Any) -> None:
    """What `post_init` is while the model is built."""
    del model.__dict__["post_init"]
    model.post_init()
    with _changing:
        _settle(model)


def _settle(model: Any) -> None:
    """Restore what the config of a complete model records, or say that it is not."""
    record = model.config.__dict__.get(RECORD)
    parts = [part for part in _models(model) if part is not model]
    restored = [part for part in parts if getattr(state_of(part), "source", None) is not None]
    for part in restored:
        if part.config is model.config:
            record = getattr(part, ATTRIBUTE).source
    if restored or _asks_for_variants(model, record):
        _restore(model, record, restored)
    elif not any(part.config is model.config for part in parts):
        # a part that has the same config has said it
        warnings.warn(plain_reload(model, record), stacklevel=3)


def _asks_for_variants(model: Any, record: Any) -> bool:
    """Whether the model's attention implementation is one that a model so patched names."""
    if any(implementation_of(config) in masks.KEYS for config in _configs(model)):
        return True
    # models whose softmax is replaced keep their own implementation
    entries = record.get("patches") if isinstance(record, dict) else None
    backends = [entry.get("backend") for entry in entries or () if isinstance(entry, dict)]
    return HOOK in backends and implementation_of(model.config) == "eager"


def _restore(model: Any, record: Any, restored: list[Any]) -> None:
    """Patch a complete model; what cannot be, as a part that others will, refuses to compute."""
    try:
        if record is None:
            raise ValueError("its config records no variants")
        entries = read_record(record, _WHERE)
        found = resolve_names(model, entries, _WHERE)
    except ValueError as error:
        _leave(model, error)
        return
    if not found:
        return
    for part in restored:
        # the whole owns the patches, not the part that was complete before it
        remove(part, list(getattr(part, ATTRIBUTE).handles))
    before = [(config, config.__dict__.pop(RECORD, None)) for config in _configs(model)]
    named = [(config, implementation_of(config)) for config, _ in before]
    _name_default(model)
    try:
        restore(model, found)
    except BaseException as error:
        for config, own in before:
            if own is not None:
                setattr(config, RECORD, own)
        for config, name in named:
            set_implementation(config, name)
        if not isinstance(error, ValueError):
            raise
        _leave(model, error)
        return
    getattr(model, ATTRIBUTE).source = record
    for module in model.modules():
        module.__dict__.pop(UNRESTORED, None)
        if isinstance(module, AttnVariant):
            module.tells = True


def _leave(model: nn.Module, error: ValueError) -> None:
    """Keep why the attention modules of a model cannot compute."""
    for target in attention_modules(model):
        if PREVIOUS not in target.module.__dict__:
            target.module.__dict__[UNRESTORED] = str(error)


def _name_default(model: Any) -> None:
    """Name in place of our keys what the model would use if nothing had been asked for."""
    for part in _models(model):
        if implementation_of(part.config) in masks.KEYS:
            set_implementation(part.config, default_implementation(part))
    for config in _configs(model):
        if implementation_of(config) in masks.KEYS:
            set_implementation(config, implementation_of(model.config))


def _models(model: nn.Module) -> Iterator[Any]:
    from transformers import PreTrainedModel

    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a model and of its parts, and those below them, each once."""
    waiting = [part.config for part in _models(model)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) in found or not has_implementation(config):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())
