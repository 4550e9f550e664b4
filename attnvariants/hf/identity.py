"""Whether a patched model with softmax in place of its variant computes what it did before."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnvariants.hf.exact import Exactly
from attnvariants.hf.judge import CLOSE
from attnvariants.hf.modes import softmax, unpatched
from attnvariants.hf.outputs import Case, difference, meaning_of, outputs_of
from attnvariants.hf.padding import GIVEN, LEFT, RIGHT, Batch
from attnvariants.hf.probe import Probe
from attnvariants.hf.reasons import UnavailableError

Configs = list[tuple[Any, str]]


@dataclass(frozen=True)
class Known:
    """A case, what the unpatched model returned for it, and which parts mean something."""

    case: Case
    own: list[Tensor]
    parts: list[Tensor | None]


def known_cases(root: nn.Module, probe: Probe) -> list[Known]:
    """The inputs whole and padded, and what the model returns, which is unpatched meanwhile."""
    batches = [probe.plain]
    for side in (LEFT, RIGHT, GIVEN):
        batch = probe.padded.get((side, probe.source or ""))
        if isinstance(batch, Batch):
            batches.append(batch)
    if len(batches) > 1 and probe.plain.seen is not None:
        # the padding that was given is among the padded ones, with what it hides
        batches = batches[1:]
    found = []
    for batch in batches:
        seen = batch.seen if batch.mask is None else batch.mask != 0
        case = Case(batch.what, batch.inputs, seen, batch.other)
        own = outputs_of(root, case)
        found.append(Known(case, own, meaning_of(root, case, own)))
    return found


def judge_identity(
    root: nn.Module,
    configs: Configs,
    known: list[Known],
    tolerance: float,
    exactly: Exactly,
    experts: bool,
) -> tuple[float | None, str]:
    """Softmax by the patch against the model's own operator, else against its eager one.

    Args:
        root: the patched model.
        configs: the switched configs with their previous operators.
        known: see `known_cases`.
        tolerance: largest difference.
        exactly: the model in float64.
        experts: whether half precision may send tokens to other experts.

    Raises:
        ValueError: the difference is too large.
    """
    change, note = _change(root, configs, known, tolerance)
    if change <= tolerance:
        return change, note
    why = ""
    try:
        copied, other_configs, probe = exactly.made()
        try:
            with unpatched(other_configs):
                again = known_cases(copied, probe)
            exact, _ = _change(copied, other_configs, again, min(tolerance, CLOSE))
        except Exception as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
    except UnavailableError as error:
        why = f" It cannot be told from rounding in float64: {error}."
        if experts:
            return None, f"half precision sends tokens to other experts, and float64 fails: {error}"
    else:
        if exact <= min(tolerance, CLOSE):
            return exact, f"{note}, in float64, where rounding does not show ({change:.3g} else)"
        change, tolerance = exact, min(tolerance, CLOSE)
    raise ValueError(
        f"verify: with softmax in place of the variant the model's outputs differ by "
        f"{change:.3g} of the largest from the unpatched model's, more than {tolerance:g}; "
        f"the mask or another argument does not reach the patched modules as it should.{why}"
    )


def _change(
    root: nn.Module, configs: Configs, known: list[Known], tolerance: float
) -> tuple[float, str]:
    note = "softmax in place of the variant"
    changes = []
    for entry in known:
        with softmax(root):
            patched = outputs_of(root, entry.case)
        change = _difference(entry.own, patched, entry.parts)
        if not change <= tolerance:
            # sdpa and eager of some models differ; eager is what their authors wrote
            eager = [(config, "eager") for config, _ in configs]
            with unpatched(eager) if eager else nullcontext():
                change = min(
                    change, _difference(outputs_of(root, entry.case), patched, entry.parts)
                )
            if "eager" not in note:
                note += ", against eager attention"
        changes.append(change)
    worst = changes[0]
    for change in changes:
        worst = change if not change <= worst else worst
    return worst, note


def _difference(own: list[Tensor], got: list[Tensor], parts: list[Tensor | None]) -> float:
    """The difference where the unpatched model's outputs are finite."""
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in got]:
        return float("inf")
    finite = [tensor.isfinite() for tensor in own]
    own, got = (
        [tensor.masked_fill(~able, 0) for tensor, able in zip(outputs, finite, strict=True)]
        for outputs in (own, got)
    )
    return difference(own, got, parts)
