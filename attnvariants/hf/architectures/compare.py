"""One architecture, tiny: does a patch with softmax keep what it computes?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.architectures.drive import (
    cases_of,
    parts_beside,
    patch_most,
    ran_in,
    runnable,
    state_of_model,
    watching,
)
from attnvariants.hf.architectures.hidden import absence
from attnvariants.hf.architectures.tiny import Sizes, model_class, tiny_config, tiny_model
from attnvariants.hf.find import attention_modules
from attnvariants.hf.judge import NOT_SO
from attnvariants.hf.outputs import Case, difference, meaning_of, outputs_of, sentence
from attnvariants.hf.patcher import Patch, patch
from attnvariants.hf.reasons import UntestableError
from attnvariants.hf.verify import TITLES, Verification

TOLERANCE = 1e-4
# Identical; so through the hook; not taken; wrong, or with another variant; no inputs or no model;
# nothing to patch.
COUNTED = "hidden keys counted"
VERDICTS = ("identical", "by hook", "refused", "different", COUNTED, "not driven", "no attention")
HOOK = "softmax-hook"
# Figures of the self-test that an outcome keeps.
FIGURES = ("leak", "padding", "right_padding", "hidden", "cache", "packed")


@dataclass
class Outcome:
    """What became of one model type.

    Attributes:
        model_type: as transformers names it.
        model: class that was built.
        verdict: one of `VERDICTS`.
        difference: largest relative difference from the model's own eager attention.
        dispatches: whether any of its attention goes through transformers' interface.
        attention: number of attention modules of the tiny model.
        patched: of those, how many a patch takes.
        reached: of those, how many ran.
        inputs: what the model was run on.
        leak, padding, right_padding, hidden, cache, packed: figures of `Verification`; None if the
            self-test does not apply.
        skipped: what of the self-test does not apply, and why.
        absent: largest relative difference, with variants that are no softmax, of a row of
            attention from one without the keys that are hidden from it; None if none was compared.
        note: why it was refused or not driven, and what was left unpatched or unmeasured.
    """

    model_type: str
    model: str = ""
    verdict: str = "not driven"
    difference: float | None = None
    dispatches: bool = False
    attention: int = 0
    patched: int = 0
    reached: int = 0
    inputs: str = ""
    leak: float | None = None
    padding: float | None = None
    absent: float | None = None
    right_padding: float | None = None
    hidden: float | None = None
    cache: float | None = None
    packed: float | None = None
    skipped: str = ""
    note: str = ""


def drive(model_type: str, sizes: Sizes | None = None, **patching: Any) -> Outcome:
    """Build a tiny model of a type, patch it with softmax, compare, self-test, unpatch, compare.

    Args:
        model_type: as transformers names it.
        sizes: of the tiny model.
        **patching: further arguments of `patch`.

    Raises:
        ValueError: transformers has no such model type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    outcome = Outcome(model_type)
    try:
        config_class = CONFIG_MAPPING[model_type]
    except KeyError:
        raise ValueError(
            f"the installed transformers has no model type {model_type!r}; give it as in a "
            "config.json."
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = tiny_config(config_class, sizes)
            cls = model_class(config)
            outcome.model = cls.__name__
            model = tiny_model(config, cls)
        except Exception as error:
            outcome.note = sentence(error)
            return outcome
        compare(model, outcome, **patching)
        if outcome.verdict == "refused" and HOOK in outcome.note and "backend" not in patching:
            hooked = Outcome(model_type, outcome.model)
            compare(model, hooked, **patching, backend=HOOK)
            if hooked.verdict in ("identical", "different", COUNTED):
                hooked.dispatches = outcome.dispatches
                hooked.verdict = hooked.verdict.replace("identical", "by hook")
                return hooked
    return outcome


def compare(model: nn.Module, outcome: Outcome, **patching: Any) -> None:
    """Fill an outcome with what a patch does to a model, which is left as it was."""
    targets = attention_modules(model)
    outcome.attention = len(targets)
    outcome.dispatches = any(target.dispatches for target in targets)
    if not targets:
        outcome.verdict = "no attention"
        return
    before = state_of_model(model)
    refusal = _refusal(model, patching)
    if state_of_model(model) != before:
        outcome.verdict, outcome.note = "different", "it is not left as it was"
        return
    if refusal:
        outcome.verdict, outcome.note = "refused", refusal
        return
    runs, why = _runs(model)
    if not runs:
        outcome.note = why
        return
    # some models change their attention when they first run
    targets, before = attention_modules(model), state_of_model(model)
    outcome.inputs = ", ".join(dict.fromkeys(run.what for run in runs))
    whole = _taken_whole(model, patching)
    handle = patch_most(model, "softmax", **patching)
    outcome.patched = len(handle.names)
    left = {
        f"{type(t.module).__name__} stays as it is" for t in targets if t.name not in handle.names
    }
    notes = sorted(left) + [why for run in runs for why in run.untaken]
    if not whole:
        notes.insert(0, "patch needs layers= that names what can be patched")
    try:
        with watching(model) as calls:
            outcome.difference, where = _worst(runs)
        outcome.reached = len(calls.holders)
        if calls.modules - calls.holders:
            where = "patched modules ran without their variant"
            outcome.difference = float("inf")
        outcome.verdict = "identical" if outcome.difference <= TOLERANCE else "different"
        notes += [where] if outcome.verdict == "different" else []
        if not calls.holders:
            outcome.verdict = "not driven"
            notes.append("none of its patched modules ran")
        if outcome.reached < outcome.patched:
            notes.append(f"{outcome.patched - outcome.reached} patched modules did not run")
        notes += _self_test(handle, outcome)
    except Exception as error:
        outcome.verdict = "different"
        notes = [f"{type(error).__name__} when patched: {sentence(error)}"]
    finally:
        handle.unpatch()
    if state_of_model(model) != before or _worst(runs)[0] != 0:
        outcome.verdict = "different"
        notes.append("its state or outputs are not restored by unpatch")
    elif outcome.verdict == "identical":
        notes += _hidden_keys(model, runs, outcome, patching)
    outcome.note = "; ".join(notes)


def _hidden_keys(
    model: nn.Module, runs: list[_Run], outcome: Outcome, patching: dict[str, Any]
) -> Iterator[str]:
    """Whether keys are hidden from other variants too; yields what to note."""
    try:
        found = absence(
            model,
            lambda: [outputs_of(run.model, case) for run in runs for case, *_ in run.cases],
            **patching,
        )
    except Exception as error:
        outcome.verdict = COUNTED
        yield f"{type(error).__name__} with another variant: {sentence(error)}"
        return
    outcome.absent = found.difference
    if found.difference is not None and not found.difference <= TOLERANCE:
        outcome.verdict = COUNTED
        yield f"a hidden key counts in {found.where}"
    if found.note:
        yield found.note


def _refusal(model: nn.Module, patching: dict[str, Any]) -> str:
    """Why `patch` takes none of the model's text attention; empty if it takes some."""
    try:
        handle = patch_most(model, "softmax", **patching)
    except ValueError as error:
        return sentence(error)
    text = {target.name for target in attention_modules(model) if target.text}
    taken = text.intersection(handle.names)
    handle.unpatch()
    if taken:
        return ""
    try:
        patch(model, "softmax", **patching).unpatch()
    except ValueError as error:
        return sentence(error)
    return ""


def _taken_whole(model: nn.Module, patching: dict[str, Any]) -> bool:
    """Whether `patch` takes the model without being told which layers."""
    try:
        patch(model, "softmax", **patching).unpatch()
    except ValueError:
        return False
    return True


@dataclass
class _Run:
    """A model or a part of one, its cases and what it returned for them before the patch.

    With each case go the outputs and which parts of them are compared; with the model, why it
    does not run further cases.
    """

    model: nn.Module
    what: str
    cases: list[tuple[Case, list[Tensor], list[Tensor | None]]]
    untaken: list[str]


def _runs(model: nn.Module) -> tuple[list[_Run], str]:
    """The unpatched runs of a model and of the parts that its own inputs do not run."""
    sample, why = runnable(model)
    if sample is None:
        return [], f"no inputs could be made: {why}"
    cases = []
    untaken: list[str] = []
    for case in cases_of(model, sample):
        try:
            own = outputs_of(model, case)
            cases.append((case, own, meaning_of(model, case, own)))
        except Exception as error:
            # not every model takes padding
            if case.name == "plain":
                return [], sentence(error)
            untaken.append(f"it takes no {case.name} rows: {sentence(error)}")
    plain, own, _ = cases[0]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in own):
        return [], "its own outputs are not finite"
    if difference(own, outputs_of(model, plain)) != 0:
        return [], "its own outputs are random"
    runs = [_Run(model, sample.what, cases, untaken)]
    targets = attention_modules(model)
    missed = {target.name for target in targets} - ran_in(model, targets, plain)
    for name, part in parts_beside(model, missed):
        inner, _ = _runs(part)
        runs += [
            _Run(run.model, f"{name}: {run.what}", run.cases, run.untaken) for run in inner[:1]
        ]
    return runs, ""


def _worst(runs: Iterable[_Run]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for run in runs:
        for case, expected, parts in run.cases:
            change = difference(expected, outputs_of(run.model, case), parts)
            if not change <= worst:
                worst, where = change, f"{case.name} {run.what}"
    return worst, where


def _self_test(handle: Patch, outcome: Outcome) -> Iterator[str]:
    """Run the patch's own test; yields what to note."""
    try:
        result = handle.verify()
    except UntestableError as error:
        outcome.skipped = f"all: {sentence(error)}"
        yield f"no self-test: {sentence(error)}"
        return
    except ValueError as error:
        outcome.verdict = "different"
        yield sentence(error)
        return
    for name in FIGURES:
        setattr(outcome, name, getattr(result, name))
    outcome.skipped = "; ".join(_skipped(result))


def _skipped(result: Verification) -> Iterator[str]:
    """The tests that do not apply by reason, and what of the others could not be compared."""
    by_reason: dict[str, list[str]] = {}
    for name, title in TITLES.items():
        note = result.notes[name]
        if getattr(result, name) is None:
            by_reason.setdefault(note, []).append(title)
        elif NOT_SO in note:
            by_reason.setdefault(note.partition(NOT_SO)[2], []).append(f"part of {title}")
    for reason, titles in by_reason.items():
        yield f"{', '.join(titles)}: {reason}"
