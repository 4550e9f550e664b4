"""What a patched model remembers, and the only code that changes a model or puts it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from attnvariants.hf import masks
from attnvariants.hf.dispatch import PREVIOUS, previous_of
from attnvariants.hf.find import Target
from attnvariants.hf.holder import CHILD, AttnVariant

ATTRIBUTE = "_attn_patch_state"
RECORD = "attn_variants"


class Handle(Protocol):
    """A patch: the names of the modules it owns."""

    names: tuple[str, ...]


@dataclass
class PatchState:
    """Kept on the model while it is patched.

    Attributes:
        handles: the patches in the model.
        configs: the configs they switched, with the attention implementation each named before.
        records: the configs that hold a record of the patches, with what was there before.
    """

    handles: list[Any] = field(default_factory=list)
    configs: list[tuple[Any, str]] = field(default_factory=list)
    records: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def handle_of(self, name: str) -> Any:
        """The patch that owns a module, or None."""
        return next((handle for handle in self.handles if name in handle.names), None)


def state_of(model: nn.Module) -> PatchState | None:
    """The state of a patched model; None if it is not patched."""
    return getattr(model, ATTRIBUTE, None)


def attach(
    model: nn.Module,
    handle: Handle,
    holders: dict[str, tuple[Target, AttnVariant]],
    targets: list[Target],
) -> None:
    """Put holders into their modules on behalf of a handle; all or nothing.

    Raises:
        ValueError: as `switch`.
    """
    state = state_of(model) or PatchState()
    switch(state, [target for target, _ in holders.values()], targets)
    setattr(model, ATTRIBUTE, state)
    state.handles.append(handle)
    try:
        for target, holder in holders.values():
            holder.train(target.module.training)
            target.module.add_module(CHILD, holder)
        _record(model, state)
    except BaseException:
        remove(model, [handle])
        raise


def switch(state: PatchState, chosen: list[Target], targets: list[Target]) -> None:
    """Point the configs of the chosen modules at our functions, remembering what they named.

    Modules that read the same configs and carry no variant are told their previous operator.

    Raises:
        ValueError: a config is another model's too, or a module that stays as it is has an
            operator whose masks cannot be made; nothing is changed then.
    """
    known = {id(config) for config, _ in state.configs}
    steps: dict[int, tuple[Any, str]] = {}
    for config in (config for target in chosen for config in target.configs):
        now = config._attn_implementation
        if now not in masks.KEYS:
            steps[id(config)] = config, now
        elif id(config) not in known:
            raise ValueError(
                f"the config names {now!r} though this model is not patched: it is shared with a "
                "patched model or copied from one; give the model a config of its own and call "
                "model.set_attn_implementation('sdpa')."
            )
    picked = {target.name for target in chosen}
    previous = []
    for target in targets:
        if not target.dispatches or id(target.config) not in steps:
            continue
        try:
            operator = previous_of(target.module, steps[id(target.config)][1] or "eager")
        except ValueError:
            if target.name not in picked:
                raise
            continue
        previous.append((target.module, operator))

    for module, operator in previous:
        setattr(module, PREVIOUS, operator)
    state.configs = [pair for pair in state.configs if id(pair[0]) not in steps]
    for config, now in steps.values():
        state.configs.append((config, now))
        config._attn_implementation_internal = _key(config, targets)


def remove(model: nn.Module, handles: list[Any]) -> None:
    """Take the handles' holders out; with the last one, restore configs and modules."""
    state: PatchState = getattr(model, ATTRIBUTE)
    for name in (name for handle in handles for name in handle.names):
        module = model.get_submodule(name)
        if hasattr(module, CHILD):
            delattr(module, CHILD)
    state.handles = [kept for kept in state.handles if not any(kept is gone for gone in handles)]
    if state.handles:
        _record(model, state)
        return
    for config, previous in state.configs:
        # An implementation that was set meanwhile is the user's choice.
        if config._attn_implementation in masks.KEYS:
            config._attn_implementation_internal = previous
    for module in model.modules():
        module.__dict__.pop(PREVIOUS, None)
    for config, before in state.records:
        config.__dict__.pop(RECORD, None)
        config.__dict__.update(before)
    delattr(model, ATTRIBUTE)


def _key(config: Any, targets: list[Target]) -> str:
    """Causality may be left to the modules only if every module on the config is causal."""
    served = [
        getattr(target.module, "is_causal", None) is True
        for target in targets
        if target.dispatches and any(config is other for other in target.configs)
    ]
    return masks.IMPLICIT if all(served) else masks.EXPLICIT


def _record(model: nn.Module, state: PatchState) -> None:
    """Write what is patched into the config of every outermost transformers model."""
    from transformers import PreTrainedModel

    roots: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(root + ".") for root in roots)
        if isinstance(module, PreTrainedModel) and not inside:
            roots[name] = module
    recorded = {id(config) for config, _ in state.records}
    for config in (root.config for root in roots.values()):
        if id(config) not in recorded:
            before = {RECORD: config.__dict__[RECORD]} if RECORD in config.__dict__ else {}
            state.records.append((config, before))
    for root in roots.values():
        entries: list[dict[str, Any]] = []
        for name, module in root.named_modules():
            holder = getattr(module, CHILD, None)
            if not isinstance(holder, AttnVariant):
                continue
            record = holder.record()
            same = (e for e in entries if {**e, "modules": 0} == {**record, "modules": 0})
            entry = next(same, None)
            if entry is None:
                entry = {**record, "modules": []}
                entries.append(entry)
            entry["modules"].append(name)
        setattr(root.config, RECORD, {"version": 1, "patches": entries})
