"""Which backend a recorded variant is restored through, where transformers has moved a family.

From version to version families stop computing attention themselves and call transformers'
attention interface (GPT-J and CodeGen in 5.24). A record names the backend of the version that it
was written with; the variant is the same through either.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from attnvariants.hf import softmax_hook
from attnvariants.hf.find import Target, attention_modules
from attnvariants.hf.holder import DISPATCH, HOOK
from attnvariants.registry import get_variant


def settled(
    model: nn.Module, entries: Iterable[dict[str, Any]], impl: str | None = None
) -> list[dict[str, Any]]:
    """The entries of a record, each with the backend that its modules have here.

    Warns where that is another one than the record names.

    Args:
        model: holds the modules that the entries name.
        entries: as `record.read_record` gives them.
        impl: the engine that is asked for in place of the recorded one.

    Raises:
        ValueError: modules compute attention themselves here, and the engine needs more than
            scores.
    """
    targets = {target.name: target for target in attention_modules(model)}
    result: list[dict[str, Any]] = []
    for entry in entries:
        recorded = entry.get("backend", DISPATCH)
        parts: dict[str, list[str]] = {}
        for name in entry["modules"]:
            backend = _backend(targets.get(name), recorded, entry)
            parts.setdefault(backend, []).append(name)
        for backend, names in parts.items():
            if backend == recorded:
                result.append({**entry, "modules": names})
                continue
            kind = type(targets[names[0]].module).__name__
            engine = impl or entry["impl"]
            _check_engine(kind, backend, engine)
            warnings.warn(_moved(kind, len(names), recorded, backend), stacklevel=2)
            left_out = {"backend"} if backend == DISPATCH else {"masks"}
            more = {} if backend == DISPATCH else {"backend": backend}
            kept = {key: value for key, value in entry.items() if key not in left_out}
            result.append({**kept, **more, "modules": names})
    return result


def _backend(target: Target | None, recorded: str, entry: dict[str, Any]) -> str:
    """The recorded backend unless the other one is the module's here."""
    if target is None or recorded not in (DISPATCH, HOOK):
        return recorded
    if recorded == HOOK:
        return DISPATCH if target.dispatches and not target.reason else HOOK
    if target.dispatches:
        return DISPATCH
    variant = get_variant(entry["variant"])
    return DISPATCH if softmax_hook.refusal(target, variant, entry["options"]) else HOOK


def _check_engine(kind: str, backend: str, engine: str) -> None:
    try:
        if backend == HOOK:
            softmax_hook.check_engine(engine)
    except ValueError as error:
        raise ValueError(
            f"{kind} computes attention itself in the installed transformers, and the variant was "
            f"saved with impl={engine!r}, which needs a version where it calls the attention "
            "interface: upgrade transformers, or load with impl='auto'."
        ) from error


def _moved(kind: str, count: int, recorded: str, backend: str) -> str:
    import transformers

    way = "calls the attention interface" if backend == DISPATCH else "computes attention itself"
    return (
        f"{count} modules of class {kind} were saved with backend={recorded!r}; in transformers "
        f"{transformers.__version__} that class {way}, so they are restored with "
        f"backend={backend!r}: the same variant and values."
    )
