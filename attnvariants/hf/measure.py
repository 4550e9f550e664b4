"""What the self-test of a patch measures: comparisons of two runs of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import parameters
from attnvariants.hf.outputs import named_tensors, per_token, run, tensors_in
from attnvariants.hf.padding import GIVEN, LEFT, MIDDLE, RIGHT, Batch
from attnvariants.hf.probe import Probe
from attnvariants.hf.reasons import InapplicableError


class Runs:
    """A model as it is now, and what it returned so far."""

    def __init__(self, root: nn.Module):
        self.root = root
        self._kept: dict[Any, tuple[Mapping[str, Any], str, Tensor, dict[str, Tensor]]] = {}

    def outputs(self, inputs: Mapping[str, Any], length: int | None) -> Tensor:
        """The output for every token, `[batch, length, width]`, else any, in float32 or wider."""
        return self._ran(inputs, length)[1]

    def name(self, inputs: Mapping[str, Any], length: int | None) -> str:
        """What the model calls that output."""
        return self._ran(inputs, length)[0]

    def named(self, inputs: Mapping[str, Any], length: int | None) -> dict[str, Tensor]:
        """All floating tensors that the model returned for these inputs, by name."""
        return self._ran(inputs, length)[2]

    def rows(self, batch: Batch, length: int | None) -> Tensor:
        """The outputs for every token of a batch.

        Raises:
            InapplicableError: the model returns none.
        """
        found = self.outputs(batch.inputs, length)
        if length is None or found.dim() < 3 or found.shape[1] != length:
            raise InapplicableError(
                f"its outputs, {list(found.shape)}, are not one for each of {length} tokens"
            )
        return found

    def _ran(
        self, inputs: Mapping[str, Any], length: int | None
    ) -> tuple[str, Tensor, dict[str, Tensor]]:
        kept = self._kept.get((id(inputs), length))
        if kept is not None:
            return kept[1:]
        result = run(self.root, inputs)
        found = None if length is None else per_token(result, length)
        accepts = parameters(self.root)
        able = "output_hidden_states" in accepts or "kwargs" in accepts
        if length is not None and found is None and able:
            more = run(self.root, inputs, output_hidden_states=True)
            found = per_token(more, length)
            result = result if found is None else more
        if found is None:
            found = next(tensors_in(result), None)
        if found is None:
            raise ValueError(f"{type(result).__name__} holds no floating tensor")
        named = named_tensors(result)
        name = next(key for key, value in named.items() if value is found)
        found = found if found.dtype == torch.float64 else found.float()
        # the inputs are kept so that their id stays theirs
        self._kept[id(inputs), length] = inputs, name, found, named
        return name, found, named


@dataclass(frozen=True)
class Part:
    """One comparison of a test.

    Attributes:
        test: the figure of `Verification` that it belongs to.
        what: what is compared, in words.
        measure: gives the largest difference, relative to the largest output.
    """

    test: str
    what: str
    measure: Callable[[Runs], float]


def measured(part: Part, runs: Runs) -> float | Exception:
    """What a part gives in a model as it is now; the error where it gives nothing."""
    try:
        return part.measure(runs)
    except Exception as error:
        return error


def parts_of(probe: Probe) -> list[Part]:
    """The comparisons of all tests but those of caches and packed documents."""
    parts = [leak_part(probe)]
    tests = {LEFT: "padding", RIGHT: "right_padding", GIVEN: "padding"}
    if not probe.padded:
        for test in ("padding", "right_padding", "hidden"):
            parts.append(never(test, no_tokens(probe)))
    for (side, _), batch in probe.padded.items():
        kind = tests.get(side)
        if side in (GIVEN, MIDDLE) and isinstance(batch, str):
            continue
        if kind is not None:
            parts.append(
                never(kind, batch) if isinstance(batch, str) else _short(probe, batch, kind)
            )
        parts.append(never("hidden", batch) if isinstance(batch, str) else _hidden(probe, batch))
    return parts


def no_tokens(probe: Probe) -> str:
    """The property of inputs that hold no tokens."""
    return f"its inputs are {', '.join(sorted(probe.plain.inputs))}, not tokens"


def never(test: str, why: str | Exception) -> Part:
    """A part that does not apply, or cannot be made."""

    def measure(runs: Runs) -> float:
        raise InapplicableError(why) if isinstance(why, str) else why

    return Part(test, str(why), measure)


def leak_part(probe: Probe) -> Part:
    """The change of outputs before a changed token."""

    def measure(runs: Runs) -> float:
        if probe.changed is None or probe.free is None:
            raise InapplicableError(no_tokens(probe))
        batch = probe.main
        first = runs.rows(batch, probe.length)
        seen = _all(batch.seen, first)
        free = probe.free & seen
        places = torch.arange(free.shape[1], device=free.device)
        last = places == torch.where(free, places, -1).amax(-1, keepdim=True)
        begin = (free.shape[1] + int((~seen).sum(-1).amax())) // 2
        worst, compared = 0.0, False
        for where in (last & free, free & (places >= begin)):
            before = seen & (where.cumsum(-1) == 0) & where.any(-1, keepdim=True)
            if not bool(before.any()):
                continue
            compared = True
            second = runs.outputs(probe.changed_at(where, batch), probe.length)
            worst = max(worst, change(first, second, before, seen))
        if not compared:
            raise InapplicableError(
                f"no token of {probe.changed} that stands for text alone has one before it"
            )
        return worst

    return Part("leak", "change of outputs before a changed token", measure)


def _hidden(probe: Probe, batch: Batch) -> Part:
    def measure(runs: Runs) -> float:
        first = runs.rows(batch, probe.length)
        if batch.other is None:
            raise InapplicableError(f"{batch.what} hide no token that can be changed")
        seen = _all(batch.seen, first)
        return change(first, runs.outputs(batch.other, probe.length), seen, seen)

    return Part("hidden", f"other hidden tokens in {batch.what}", measure)


def _short(probe: Probe, batch: Batch, test: str) -> Part:
    def measure(runs: Runs) -> float:
        if isinstance(batch.short, str):
            raise InapplicableError(batch.short)
        short = batch.short
        first = runs.rows(batch, probe.length)[short.rows, short.columns]
        alone = runs.outputs(short.inputs, first.shape[1])
        if alone.shape != first.shape:
            raise InapplicableError(
                f"without the hidden tokens its outputs are {list(alone.shape)}, not "
                f"{list(first.shape)}"
            )
        everywhere = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        return change(first, alone, everywhere, everywhere)

    return Part(test, f"{batch.what} against the same without padding", measure)


def change(first: Tensor, second: Tensor, where: Tensor, seen: Tensor) -> float:
    """Largest difference at some tokens, relative to the largest output that is seen.

    Raises:
        InapplicableError: the outputs are not of one shape.
    """
    if second.shape != first.shape:
        raise InapplicableError(
            f"with other tokens its outputs are {list(second.shape)}, not {list(first.shape)}"
        )
    largest = first[seen].abs().max().clamp(min=torch.finfo(first.dtype).tiny)
    return float((second[where].to(first.dtype) - first[where]).abs().max() / largest)


def _all(seen: Tensor | None, first: Tensor) -> Tensor:
    if seen is not None:
        return seen
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
