"""Put a variant into a loaded model, and take it out again without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnvariants.hf import masks
from attnvariants.hf.build import Request, build_holder, requests_of
from attnvariants.hf.dispatch import PREVIOUS, previous_of
from attnvariants.hf.find import Target, attention_modules
from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.report import Report, Row
from attnvariants.hf.select import Layers, select
from attnvariants.hf.verify import Verification, verify_model
from attnvariants.registry import Variant

STATE = "_attn_patch_state"
RECORD = "attn_variants"


@dataclass
class _State:
    """What a patched model remembers: its handles and the configs they switched."""

    patches: list[Patch] = field(default_factory=list)
    configs: list[tuple[Any, str]] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)


class Patch:
    """Handle of a `patch` call: report, self-test and removal; also a context manager.

    Attributes:
        model: the patched model.
        names: qualified names of the modules this call patched.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        self.model = model
        self.names = names

    @property
    def active(self) -> bool:
        """Whether the patch is still in the model."""
        state = getattr(self.model, STATE, None)
        return state is not None and any(patch is self for patch in state.patches)

    @property
    def report(self) -> Report:
        """Every attention module of the model as it is now."""
        return _report(self.model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters that this call added, by qualified name."""
        return {
            f"{name}.{CHILD}.{key}": value
            for name in self.names
            if hasattr(module := self.model.get_submodule(name), CHILD)
            for key, value in getattr(module, CHILD).named_parameters()
        }

    def verify(
        self,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        tolerance: float | None = None,
        seed: int = 0,
    ) -> Verification:
        """Run the model and prove that the patch keeps causality and padding.

        A future token must change nothing before it (difference exactly 0 where the unpatched
        model's is), a left-padded row must equal the unpadded one, and every patched module must
        be reached. Tests that the unpatched model does not pass either are reported as not
        applicable. Modes, gradients and the global random state are left as they were.

        Args:
            inputs: keyword arguments of the model's forward; by default small random ones.
            tolerance: largest relative difference of a padded row; by default 1e-4, and 5e-2 for
                models in half precision.
            seed: of the random inputs.

        Raises:
            ValueError: a test failed, the patch is no longer active, or no inputs could be made
                for this model.
        """
        self._require_active()
        return verify_model(self.model, getattr(self.model, STATE).configs, inputs, tolerance, seed)

    def unpatch(self) -> None:
        """Take this call's variants out; the last one restores the model completely.

        Raises:
            ValueError: the patch is not in the model any more.
        """
        self._require_active()
        _remove(self.model, [self])

    def _require_active(self) -> None:
        if not self.active:
            raise ValueError(
                f"this patch of {type(self.model).__name__} is not active: it was unpatched; "
                "call patch again."
            )

    def __enter__(self) -> Patch:
        self._require_active()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.active:
            self.unpatch()

    def __repr__(self) -> str:
        state = "active" if self.active else "not active"
        return f"Patch({type(self.model).__name__}, {len(self.names)} modules, {state})"


def patch(
    model: nn.Module,
    variant: str | Variant | Mapping[Any, Any],
    *,
    layers: Layers = None,
    impl: str = "auto",
    preset: str | None = None,
    train_length: int | None = None,
    trainable: bool = True,
    verify: bool = False,
    **options: Any,
) -> Patch:
    """Replace the attention operator of a Hugging Face model by a variant, in place.

    Learned options become parameters `[heads]` of the attention modules, named
    `....attn_variant.<option>`, in the dtype and on the device of the module's own parameters.
    Everything is checked before anything is changed. Patch before wrapping with PEFT, FSDP or
    DDP. `model.config.attn_variants` records what was done and is saved with the model.

    Args:
        model: a model whose attention goes through transformers' attention interface.
        variant: a name, a registered `Variant`, or a mapping of layers (an index, a tuple of
            them, or a regular expression) to a variant or a pair (variant, options).
        layers: None for all text attention; an index or several, negative ones from the end; a
            regular expression searched in module names; or a predicate `(name, module) -> bool`.
        impl: engine of `attention`: "auto", "chunked" or "reference".
        preset: name of one of the variant's presets of initial values, e.g. "retrofit".
        train_length: length the preset is computed for; default the model's longest.
        trainable: whether the learned parameters require a gradient.
        verify: run `Patch.verify`, and unpatch again if it fails.
        **options: the variant's own; for a learned one its initial value, a number or `[heads]`.

    Returns:
        The handle. Patching the same layers with the same arguments again returns the first one.

    Raises:
        ValueError: the variant, an option or a layer is unknown, a layer has another variant
            already, or the model cannot be patched; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch takes a torch model, got {type(model).__name__}.")
    masks.register()
    targets = attention_modules(model)
    requests = requests_of(variant, layers, options, preset, train_length)
    _check_engine(impl)
    plan: dict[str, tuple[Target, AttnVariant]] = {}
    for request in requests:
        for target in _chosen(model, targets, request):
            if target.name in plan:
                raise ValueError(
                    f"{target.name} is meant by more than one key of the mapping; make them "
                    "disjoint."
                )
            plan[target.name] = target, build_holder(target, request, impl, trainable)

    state: _State | None = getattr(model, STATE, None)
    fresh, again = _split(model, plan, state)
    if not fresh:
        handle = next(patch for patch in state.patches if again[0] in patch.names)
        _switch(state, [target for target, _ in plan.values()], targets)
    else:
        handle = _attach(model, fresh, targets)
    if verify:
        try:
            handle.verify()
        except BaseException:
            if fresh:
                handle.unpatch()
            raise
    return handle


def unpatch(model: nn.Module) -> None:
    """Undo every `patch` of the model: operators, parameters and config are as before.

    Raises:
        ValueError: the model is not patched, or was patched through another module.
    """
    state = getattr(model, STATE, None)
    if state is None:
        inside = isinstance(model, nn.Module) and any(
            hasattr(module, CHILD) for module in model.modules()
        )
        hint = (
            "it was patched as a part of another model; unpatch that one."
            if inside
            else "there is nothing to undo."
        )
        raise ValueError(f"{type(model).__name__} is not patched: {hint}")
    _remove(model, list(state.patches))


def _check_engine(impl: str) -> None:
    from attnvariants.api import _engine

    _engine(impl)


def _chosen(model: nn.Module, targets: list[Target], request: Request) -> list[Target]:
    """The targets of a request, all of which can be patched."""
    kind = type(model).__name__
    if not targets:
        count = sum(1 for _ in model.modules())
        raise ValueError(
            f"patch found no attention module in {kind}; {count} modules were looked at."
        )
    able = any(target.dispatches for target in targets)
    chosen = select(targets, request.layers) if able else targets
    refused = [target for target in chosen if target.reason and not target.apart]
    chosen = [target for target in chosen if not target.reason]
    if refused or not chosen:
        raise ValueError(
            f"patch cannot replace the attention of {kind}: {_reasons(refused or targets)}."
        )
    switched = {id(config) for target in chosen for config in target.configs}
    hurt = [
        target
        for target in targets
        if not target.dispatches
        and not target.apart
        and any(id(config) in switched for config in target.configs)
    ]
    if hurt:
        raise ValueError(
            f"patch cannot replace only a part of the attention of {kind}: {_reasons(hurt)}."
        )
    return chosen


def _reasons(targets: Iterable[Target]) -> str:
    """`Class (x2, first.name): reason`, grouped."""
    groups: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        groups.setdefault((type(target.module).__name__, target.reason), []).append(target.name)
    return "; ".join(
        f"{cls} ({names[0] or 'the model itself'}{f' and {len(names) - 1} more' * (len(names) > 1)}"
        f"): {reason}"
        for (cls, reason), names in groups.items()
    )


def _split(
    model: nn.Module, plan: dict[str, tuple[Target, AttnVariant]], state: _State | None
) -> tuple[dict[str, tuple[Target, AttnVariant]], list[str]]:
    """The planned modules that are not patched yet, and the names of those that are."""
    fresh, again = {}, []
    for name, (target, holder) in plan.items():
        present = getattr(target.module, CHILD, None)
        if present is None:
            fresh[name] = target, holder
        elif state is None or not any(name in patch.names for patch in state.patches):
            raise ValueError(
                f"{name} was patched through another model than this {type(model).__name__}; "
                "unpatch that one first."
            )
        elif isinstance(present, AttnVariant) and present.same_request(holder):
            again.append(name)
        else:
            raise ValueError(
                f"{name} has the variant {present.variant!r} already; call unpatch(model) or the "
                f"handle's unpatch() before patching it with {holder.variant!r}"
                f"{' and other options' * (present.variant == holder.variant)}."
            )
    return fresh, again


def _attach(
    model: nn.Module, fresh: dict[str, tuple[Target, AttnVariant]], targets: list[Target]
) -> Patch:
    chosen = [target for target, _ in fresh.values()]
    state = getattr(model, STATE, None)
    first = state is None
    if first:
        state = _State()
    handle = Patch(model, tuple(fresh))
    try:
        _switch(state, chosen, targets, partial=True)
        for target, holder in fresh.values():
            holder.train(target.module.training)
            target.module.add_module(CHILD, holder)
        state.patches.append(handle)
        setattr(model, STATE, state)
        _record(model, state)
    except BaseException:
        setattr(model, STATE, state)
        _remove(model, [handle])
        raise
    return handle


def _switch(
    state: _State, chosen: list[Target], targets: list[Target], partial: bool = False
) -> None:
    """Point the configs of the chosen modules at our functions, remembering what they said."""
    switching = {id(config): config for target in chosen for config in target.configs}
    known = {id(config) for config, _ in state.configs}
    steps, previous = [], []
    for config in switching.values():
        now = config._attn_implementation
        if now in masks.KEYS:
            if id(config) in known:
                continue
            raise ValueError(
                "the model shares its config with another patched model, or has a copy of that "
                "one's; give it a config of its own and call model.set_attn_implementation('sdpa')."
            )
        served = [
            target
            for target in targets
            if target.dispatches and any(config is other for other in target.configs)
        ]
        causal = all(getattr(target.module, "is_causal", None) is True for target in served)
        steps.append((config, now, masks.IMPLICIT if causal else masks.EXPLICIT))
    picked = {target.name for target in chosen}
    changing = {id(config): now for config, now, _ in steps}
    for target in targets:
        if target.dispatches and id(target.config) in changing:
            now = changing[id(target.config)] or "eager"
            try:
                operator = previous_of(target.module, now)
            except ValueError:
                if target.name not in picked:
                    raise
                continue
            previous.append((target.module, operator))
    for module, operator in previous:
        setattr(module, PREVIOUS, operator)
    for config, now, key in steps:
        state.configs = [(c, old) for c, old in state.configs if c is not config]
        state.configs.append((config, now))
        config._attn_implementation_internal = key


def _remove(model: nn.Module, patches: list[Patch]) -> None:
    state: _State = getattr(model, STATE)
    for handle in patches:
        for name in handle.names:
            module = model.get_submodule(name)
            if hasattr(module, CHILD):
                delattr(module, CHILD)
    state.patches = [patch for patch in state.patches if not any(patch is p for p in patches)]
    if state.patches:
        _record(model, state)
        return
    for config, previous in state.configs:
        if config._attn_implementation in masks.KEYS:
            config._attn_implementation_internal = previous
    for module in model.modules():
        module.__dict__.pop(PREVIOUS, None)
    for config in state.records:
        config.__dict__.pop(RECORD, None)
    delattr(model, STATE)


def _record(model: nn.Module, state: _State) -> None:
    """Write what is patched into the config of every outermost transformers model."""
    from transformers import PreTrainedModel

    roots: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(root == "" or name.startswith(root + ".") for root, _ in roots)
        if isinstance(module, PreTrainedModel) and not inside:
            roots.append((name, module))
    state.records = [root.config for _, root in roots]
    for prefix, root in roots:
        entries: list[dict[str, Any]] = []
        for name, module in root.named_modules():
            holder = getattr(module, CHILD, None)
            if not isinstance(holder, AttnVariant):
                continue
            record = holder.record()
            for entry in entries:
                if {k: v for k, v in entry.items() if k != "modules"} == record:
                    entry["modules"].append(name)
                    break
            else:
                entries.append({**record, "modules": [name]})
        setattr(root.config, RECORD, {"version": 1, "patches": entries})


def _report(model: nn.Module) -> Report:
    rows = []
    for target in attention_modules(model):
        holder = getattr(target.module, CHILD, None)
        if holder is None:
            previous = getattr(target.module, PREVIOUS, None)
            impl = getattr(target.config, "_attn_implementation", None) or "-"
            if previous is not None:
                impl = getattr(previous[0], "__name__", str(previous[0]))
            rows.append(
                Row(
                    target.name,
                    type(target.module).__name__,
                    target.layer,
                    None,
                    impl,
                    reason=target.reason,
                )
            )
            continue
        spec = holder()
        rows.append(
            Row(
                target.name,
                type(target.module).__name__,
                target.layer,
                spec.variant,
                spec.impl,
                sum(value.numel() for value in spec.options.values() if isinstance(value, Tensor)),
                {k: "learned" if isinstance(v, Tensor) else v for k, v in spec.options.items()},
            )
        )
    return Report(type(model).__name__, tuple(rows))
