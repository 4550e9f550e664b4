"""Which of a model's attention modules a call of `patch` means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from attnvariants.hf.find import Target

Layers = int | str | Iterable[int] | Callable[[str, Any], bool] | None


def select(targets: list[Target], layers: Layers) -> list[Target]:
    """The targets that `layers` names, in the order of the model.

    Args:
        targets: the attention modules of the model.
        layers: None for all text attention; an index or several, of the text part, negative ones
            from the end; a regular expression searched in qualified names; or a predicate
            `(name, module) -> bool`.

    Raises:
        ValueError: nothing matches, an index does not exist, or `layers` is none of these.
    """
    if layers is None:
        return [target for target in targets if target.text]
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is no regular expression: {error}.") from None
        chosen = [target for target in targets if pattern.search(target.name)]
        return _some(chosen, targets, f"layers={layers!r}")
    if callable(layers):
        chosen = [target for target in targets if layers(target.name, target.module)]
        return _some(chosen, targets, "the predicate in layers")
    return _by_index([t for t in targets if t.text and not t.apart], layers)


def _by_index(text: list[Target], layers: Any) -> list[Target]:
    wanted = [layers] if isinstance(layers, int) else layers
    try:
        wanted = list(wanted)
    except TypeError:
        wanted = [None]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in wanted):
        raise ValueError(
            "layers must be None, layer indices, a regular expression on module names or a "
            f"predicate (name, module) -> bool, got {layers!r}."
        )
    if not wanted:
        raise ValueError("layers is empty; name at least one layer, or pass None for all.")
    known = sorted({target.layer for target in text})
    chosen = set()
    for index in wanted:
        if index < 0 and -index <= len(known):
            chosen.add(known[index])
        elif index in known:
            chosen.add(index)
        else:
            raise ValueError(
                f"layer {index} has no attention module; layers with attention are "
                f"{_ranges(known)}."
            )
    return [target for target in text if target.layer in chosen]


def _some(chosen: list[Target], targets: list[Target], what: str) -> list[Target]:
    if not chosen:
        examples = ", ".join(target.name for target in targets[:3])
        raise ValueError(
            f"{what} matches none of the {len(targets)} attention modules of the model; they are "
            f"named like {examples}."
        )
    return chosen


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0..2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}..{p[-1]}" for p in parts)
