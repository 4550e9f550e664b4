"""What a `patch` call will do, worked out and refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from attnvariants.hf import softmax_hook
from attnvariants.hf.build import Request, build_holder
from attnvariants.hf.find import Target
from attnvariants.hf.holder import CHILD, DISPATCH, HOOK, AttnVariant
from attnvariants.hf.select import select
from attnvariants.hf.state import PatchState

Plan = dict[str, tuple[Target, AttnVariant]]


def check_backend(backend: str, impl: str, masks: str | None) -> None:
    """Raise ValueError for a backend that does not exist or cannot have these arguments."""
    if backend not in (DISPATCH, HOOK):
        raise ValueError(f"backend must be {DISPATCH!r} or {HOOK!r}, got {backend!r}.")
    if backend == HOOK:
        softmax_hook.check_engine(impl)
        if masks is not None:
            raise ValueError(
                f"backend={HOOK!r} reads the masks that the model makes; leave out masks, got "
                f"masks={masks!r}."
            )


def plan_patch(
    model: nn.Module,
    targets: list[Target],
    requests: list[Request],
    impl: str,
    trainable: bool,
    backend: str = DISPATCH,
) -> Plan:
    """`name -> (target, holder)` of every module the requests mean.

    Raises:
        ValueError: a module is meant twice or cannot be patched, or an option does not fit it.
    """
    plan: Plan = {}
    for request in requests:
        choose = _hooked if backend == HOOK else _chosen
        for target in choose(model, targets, request):
            if target.name in plan:
                raise ValueError(
                    f"{target.name} is meant by more than one key of the mapping; make them "
                    "disjoint."
                )
            holder = build_holder(target, request, impl, trainable)
            holder.backend = backend
            plan[target.name] = target, holder
    return plan


def new_in(plan: Plan, model: nn.Module, state: PatchState | None) -> Plan:
    """The part of the plan that the model does not carry yet.

    Raises:
        ValueError: a module carries something else than planned, or through another model.
    """
    fresh: Plan = {}
    for name, (target, holder) in plan.items():
        present = getattr(target.module, CHILD, None)
        if present is None:
            fresh[name] = target, holder
        elif state is None or state.handle_of(name) is None:
            raise ValueError(
                f"{name} was patched through another model than this {type(model).__name__}; "
                "unpatch that one first."
            )
        elif not (isinstance(present, AttnVariant) and present.same_request(holder)):
            same = present.variant == holder.variant
            raise ValueError(
                f"{name} has the variant {present.variant!r} already; call unpatch(model) or the "
                f"handle's unpatch() before patching it with {holder.variant!r}"
                f"{' and other options' if same else ''}."
            )
    return fresh


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
    stuck = [target for target in chosen if target.reason]
    refused = [target for target in stuck if not target.apart]
    chosen = [target for target in chosen if not target.reason]
    if refused or not chosen:
        others = refused or stuck
        by_hook = all(
            not softmax_hook.refusal(target, request.variant, request.options) for target in others
        )
        hint = f"; pass backend={HOOK!r}, which can" if by_hook else ""
        raise ValueError(f"patch cannot replace the attention of {kind}: {_reasons(others)}{hint}.")
    switched = {id(config) for target in chosen for config in target.configs}
    hurt = [
        target
        for target in targets
        if target.harmed and any(id(config) in switched for config in target.configs)
    ]
    if hurt:
        raise ValueError(
            f"patch cannot replace only a part of the attention of {kind}: {_reasons(hurt)}."
        )
    return chosen


def _hooked(model: nn.Module, targets: list[Target], request: Request) -> list[Target]:
    """The targets of a request, in all of which the softmax can be replaced."""
    if not targets:
        return _chosen(model, targets, request)
    judged = [
        replace(
            target,
            reason=softmax_hook.refusal(target, request.variant, request.options),
            apart=False,
        )
        for target in targets
    ]
    apart = {target.name for target in targets if target.apart}
    chosen = select(judged, request.layers)
    stuck = [target for target in chosen if target.reason]
    refused = [target for target in stuck if target.name not in apart]
    chosen = [target for target in chosen if not target.reason]
    if refused or not chosen:
        raise ValueError(
            f"patch cannot replace the attention of {type(model).__name__} through "
            f"backend={HOOK!r}: {_reasons(refused or stuck)}."
        )
    return chosen


def _reasons(targets: Iterable[Target]) -> str:
    """`Class (first.name and 3 more): reason`, grouped."""
    groups: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        groups.setdefault((type(target.module).__name__, target.reason), []).append(target.name)
    texts = []
    for (cls, reason), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        texts.append(f"{cls} ({names[0] or 'the model itself'}{more}): {reason}")
    return "; ".join(texts)
