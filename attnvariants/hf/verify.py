"""Prove on the running model that a patch kept causality and padding and reached every module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnvariants.hf.cached import cache_parts, packed_part
from attnvariants.hf.exact import Exactly
from attnvariants.hf.holder import CHILD
from attnvariants.hf.identity import judge_identity, known_cases
from attnvariants.hf.judge import TESTS, Judge, Measured
from attnvariants.hf.measure import (
    Part,
    Runs,
    leak_part,
    measured,
    parts_of,
)
from attnvariants.hf.modes import quiet, unpatched, watching
from attnvariants.hf.probe import Probe, given_probe, made_probe
from attnvariants.hf.reasons import InapplicableError, UntestableError
from attnvariants.hf.settle import is_steady, others_spoiled, require_finite, settled


@dataclass(frozen=True)
class Verification:
    """Figures of a self-test; the differences are relative to the largest output.

    A figure is None if its test does not apply; its note names the property of the model or of
    its inputs that makes it so. Of a figure its note says what was compared, and what was not.

    Attributes:
        modules: number of patched modules.
        reached: number of those that computed their variant; the others were not run at all.
        identity: largest difference from the unpatched model with softmax in place of the variant.
        leak: largest change before a changed token.
        padding: largest difference of a left-padded row from the unpadded one.
        right_padding: largest difference of a right-padded row from the unpadded one.
        hidden: largest change when tokens change that the padding mask hides.
        cache: largest difference of runs with a cache from one without.
        packed: largest difference of a packed document from the same one alone.
        notes: to each of these figures.
        tolerance: what all but `leak` and `hidden` were held to.
        failed: names of the figures that are too large; `Patch.verify` raises instead.
    """

    modules: int
    reached: int
    identity: float | None
    leak: float | None
    padding: float | None
    right_padding: float | None
    hidden: float | None
    cache: float | None
    packed: float | None
    notes: Mapping[str, str]
    tolerance: float
    failed: tuple[str, ...] = ()

    @property
    def leak_note(self) -> str:
        """What the leak test compared, or why it does not apply."""
        return self.notes["leak"]

    @property
    def padding_note(self) -> str:
        """What the padding test compared, or why it does not apply."""
        return self.notes["padding"]

    def __str__(self) -> str:
        lines = [f"reached: {self.reached} of {self.modules} patched modules"]
        for field, title in TITLES.items():
            value = getattr(self, field)
            figure = "not applicable" if value is None else f"{value:.3g}"
            lines.append(f"{title}: {figure} ({self.notes[field]})")
        return "\n".join(lines)


TITLES = {"identity": "identity", **{name: test.title for name, test in TESTS.items()}}


_RANDOM = "the unpatched model's outputs are random: the same inputs give others"


def verify_model(
    model: nn.Module,
    configs: list[tuple[Any, str]],
    inputs: Mapping[str, Any] | None,
    tolerance: float | None,
    seed: int,
    strict: bool = True,
) -> Verification:
    """See `Patch.verify`; unless strict, figures that are too large are named and not raised.

    Args:
        model: holds the patch.
        configs: the switched configs with their previous operators.
        inputs, tolerance, seed: as of `Patch.verify`.
        strict: raise for a failed test.

    Raises:
        ValueError: as `Patch.verify`.
    """
    root = _root(model)
    half = next(root.parameters()).dtype in (torch.float16, torch.bfloat16)
    if tolerance is None:
        tolerance = 5e-2 if half else 1e-4
    patched_modules = {
        name: module for name, module in root.named_modules() if hasattr(module, CHILD)
    }
    holders = {name: getattr(module, CHILD) for name, module in patched_modules.items()}
    exactly = Exactly(root, configs)
    with quiet(root):
        with unpatched(configs):
            before = Runs(root)
            if inputs is None:
                probe = made_probe(root, seed, lambda tried: before.outputs(tried, None))
            else:
                probe = given_probe(root, inputs)
            probe = settled(before, probe)
            steady = is_steady(before, probe)
            leak = measured(leak_part(probe), before)

            def parts_for(root: nn.Module, probe: Probe) -> list[Part]:
                cached = cache_parts(root, probe, causal)
                return [*parts_of(probe), *cached, packed_part(root, probe)]

            exactly.probe, exactly.parts = probe, parts_for
            causal = exactly.is_causal(leak, half) if isinstance(leak, float) else None
            parts = parts_for(root, probe)
            own: list[Measured] = [InapplicableError(_RANDOM)] * len(parts)
            if steady:
                own = [measured(part, before) for part in parts]
                known = known_cases(root, probe)
        with watching(patched_modules) as ran, watching(holders) as reached:
            after = Runs(root)
            require_finite(after, before, probe)
            got = [
                None if isinstance(figure, Exception) else measured(part, after)
                for part, figure in zip(parts, own, strict=True)
            ]
        _require_reached(holders, ran, reached)
        routed = _routed(root)
        # routed experts regroup tokens, and attention to an encoder shares sums between rows
        shared = routed or bool(getattr(root.config, "is_encoder_decoder", False))
        judge = Judge(tolerance, half, shared, exactly.figures)
        entries = list(zip(range(len(parts)), parts, own, got, strict=True))

        def judged(name: str) -> tuple[float | None, str]:
            if name != "identity":
                return judge.judge(name, [entry for entry in entries if entry[1].test == name])
            if not steady:
                return None, _RANDOM
            figure, note = judge_identity(
                root, configs, known, 4 * tolerance if half else tolerance, exactly, half and routed
            )
            spoiled = others_spoiled(before, probe)
            if spoiled:
                note += f"; the unpatched model itself gives {spoiled}, which is not compared"
            return figure, note

        figures: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        failed = []
        # a mask that is lost fails many; the first says most
        for name in [*TESTS, "identity"]:
            try:
                figures[name], notes[name] = judged(name)
            except ValueError as error:
                if strict:
                    raise
                figures[name], notes[name] = None, str(error)
                failed.append(name)
    return Verification(
        len(holders), len(reached), **figures, notes=notes, tolerance=tolerance,
        failed=tuple(failed),
    )  # fmt: skip


def _require_reached(holders: dict[str, nn.Module], ran: set[str], reached: set[str]) -> None:
    missed = [name for name in holders if name in ran and name not in reached]
    if missed:
        raise ValueError(
            f"verify: {len(missed)} of {len(holders)} patched modules never reached their "
            f"variant, the first is {missed[0]}; the model's attention implementation was set "
            "to another one after patching: patch again."
        )
    if not reached:
        raise UntestableError(
            f"verify: none of the {len(holders)} patched modules was run by these inputs; pass "
            "inputs= that use them."
        )


def _routed(root: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in root.named_modules())


def _root(model: nn.Module) -> nn.Module:
    """The outermost transformers model."""
    from transformers import PreTrainedModel

    found = next(
        (module for module in model.modules() if isinstance(module, PreTrainedModel)), None
    )
    if found is None:
        raise ValueError(
            f"verify needs a transformers model to run, {type(model).__name__} holds none; run "
            "your own check."
        )
    return found
