"""What a patched model remembers, and the only code that changes a model or puts it back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from attnvariants.hf import masks, softmax_hook
from attnvariants.hf.dispatch import PREVIOUS, SEEN, previous_of, switched
from attnvariants.hf.find import Target
from attnvariants.hf.holder import CHILD, HOOK, AttnVariant
from attnvariants.hf.idle import tell_no_more, tell_when_idle
from attnvariants.hf.names import implementation_of, set_implementation
from attnvariants.hf.penalties import PENALTIES
from attnvariants.hf.record import GUARD, SAVED_AS, entries_of, record_of
from attnvariants.hf.wrappers import plain_name, refuse_peft
from attnvariants.recorded import RECORD

ATTRIBUTE = "_attn_patch_state"
# What is written into a config: whoever saves it saves the record, and with it what stops a plain
# `from_pretrained`.
_WRITTEN = (RECORD, SAVED_AS)


class Handle(Protocol):
    """A patch: the names of the modules it owns."""

    names: tuple[str, ...]


@dataclass
class PatchState:
    """Kept on the model while it is patched.

    Attributes:
        handles: the patches in the model.
        configs: the configs they switched, with the attention implementation each named before.
        eager: the configs set to eager attention for the softmax hook, likewise.
        records: the configs that hold a record of the patches, with what was there before.
        source: the record that the patches were restored from when the model was built.
    """

    handles: list[Any] = field(default_factory=list)
    configs: list[tuple[Any, str]] = field(default_factory=list)
    eager: list[tuple[Any, str]] = field(default_factory=list)
    records: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    source: Any = None

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
    mode: str | None = None,
) -> None:
    """Put holders into their modules on behalf of a handle; all or nothing.

    Raises:
        ValueError: as `switch`.
    """
    state = state_of(model) or PatchState()
    switch(state, [target for target, _ in holders.values()], targets, mode)
    for root in _roots(model):
        _name_root(state, root.config, targets)
    setattr(model, ATTRIBUTE, state)
    state.handles.append(handle)
    try:
        for target, holder in holders.values():
            holder.train(target.module.training)
            target.module.add_module(CHILD, holder)
            if holder.backend == HOOK:
                softmax_hook.install(target)
            else:
                tell_when_idle(target)
        _record(model, state)
    except BaseException:
        remove(model, [handle])
        raise


def switch(
    state: PatchState, chosen: list[Target], targets: list[Target], mode: str | None = None
) -> None:
    """Point the configs of the chosen modules at our functions, remembering what they named.

    Modules that read the same configs and carry no variant are told their previous operator.

    Args:
        mode: as the argument masks of `patch`.

    Raises:
        ValueError: a config is another model's too or has masks of another mode, or a module that
            stays as it is has an operator whose masks cannot be made; nothing is changed then.
    """
    known = {id(config): before for config, before in state.configs}
    steps: dict[int, tuple[Any, str]] = {}
    by_hand = [target for target in chosen if not target.dispatches]
    chosen = [target for target in chosen if target.dispatches]
    for config in (config for target in chosen for config in target.configs):
        now = implementation_of(config)
        if now not in masks.KEYS:
            steps[id(config)] = config, now
        elif id(config) not in known:
            raise ValueError(
                f"the config names {now!r} though this model is not patched: it is shared with a "
                "patched model or copied from one; give the model a config of its own and call "
                "model.set_attn_implementation('sdpa')."
            )
        elif mode is not None and now != masks.key_of(config, known[id(config)], targets, mode):
            raise ValueError(
                f"the model is patched with other masks than masks={mode!r} already; call "
                "unpatch(model) first."
            )
    picked = {target.name for target in chosen}
    previous: list[tuple[nn.Module, Any]] = []
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
    for target in targets:
        if target.dispatches and not hasattr(target.module, PREVIOUS):
            setattr(target.module, SEEN, True)
    state.configs = [pair for pair in state.configs if id(pair[0]) not in steps]
    for config, now in steps.values():
        state.configs.append((config, now))
        switched[id(config)] = config
        set_implementation(config, masks.key_of(config, now or "eager", targets, mode))
    for target in filter(softmax_hook.needs_eager, by_hand):
        for config in target.configs:
            state.eager = [pair for pair in state.eager if pair[0] is not config]
            state.eager.append((config, implementation_of(config)))
            set_implementation(config, "eager")


def remove(model: nn.Module, handles: list[Any]) -> None:
    """Take the handles' holders out; with the last one, restore configs and modules."""
    state: PatchState = getattr(model, ATTRIBUTE)
    names = [name for handle in handles for name in handle.names]
    present = {plain_name(name): module for name, module in model.named_modules()}
    refuse_peft(model, "unpatch", [present.get(f"{name}.{CHILD}") for name in names])
    for module in (present[name] for name in names if name in present):
        softmax_hook.uninstall(module)
        module.__dict__.pop(PENALTIES, None)
        tell_no_more(module)
        if hasattr(module, CHILD):
            delattr(module, CHILD)
    state.handles = [kept for kept in state.handles if not any(kept is gone for gone in handles)]
    if state.handles:
        _record(model, state)
        return
    for config, previous in state.configs:
        # An implementation that was set meanwhile is the user's choice.
        if implementation_of(config) in masks.KEYS:
            set_implementation(config, previous)
        switched.pop(id(config), None)
    for config, previous in state.eager:
        if implementation_of(config) == "eager":
            set_implementation(config, previous)
    for module in model.modules():
        for name in (PREVIOUS, SEEN):
            module.__dict__.pop(name, None)
    for config, before in state.records:
        for name in _WRITTEN:
            config.__dict__.pop(name, None)
        config.__dict__.update(before)
    delattr(model, ATTRIBUTE)


def _name_root(state: PatchState, config: Any, targets: list[Target]) -> None:
    """Have the config of a model with patched parts name a key of ours, too.

    Trainers build a reference model with what this config names. Masks and operators of whatever
    reads it stay those of the implementation it named.
    """
    now = implementation_of(config)
    keys = {"sdpa": masks.IMPLICIT, "eager": masks.FLOAT}
    readers = [target for target in targets if any(config is other for other in target.configs)]
    if not state.configs or now not in keys or not all(target.dispatches for target in readers):
        return
    try:
        operators = [(target.module, previous_of(target.module, now)) for target in readers]
    except ValueError:
        return
    for module, operator in operators:
        setattr(module, PREVIOUS, operator)
    state.configs.append((config, now))
    switched[id(config)] = config
    set_implementation(config, keys[now])


def _roots(model: nn.Module) -> list[Any]:
    """The outermost transformers models."""
    from transformers import PreTrainedModel

    roots: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(root + ".") for root in roots)
        if isinstance(module, PreTrainedModel) and not inside:
            roots[name] = module
    return list(roots.values())


def _record(model: nn.Module, state: PatchState) -> None:
    """Write what is patched into the config of every outermost transformers model."""
    roots = _roots(model)
    recorded = {id(config) for config, _ in state.records}
    for config in (root.config for root in roots):
        if id(config) not in recorded:
            own = config.__dict__
            state.records.append((config, {name: own[name] for name in _WRITTEN if name in own}))
    for root in roots:
        setattr(root.config, RECORD, record_of(entries_of(root)))
        setattr(root.config, SAVED_AS, GUARD)
