"""What the unpatched model makes of the inputs of a self-test, before any blame falls."""

from __future__ import annotations

import torch
from torch import Tensor

from attnvariants.hf.measure import Runs
from attnvariants.hf.outputs import difference, not_finite, sentence
from attnvariants.hf.padding import Batch
from attnvariants.hf.probe import Probe
from attnvariants.hf.reasons import UntestableError


def settled(runs: Runs, probe: Probe) -> Probe:
    """The probe without the padded batches that the unpatched model cannot be compared on.

    Raises:
        UntestableError: the model does not run the inputs, or gives NaN or infinity for them.
    """
    cls = type(runs.root).__name__
    try:
        runs.outputs(probe.plain.inputs, probe.length)
    except Exception as error:
        raise UntestableError(
            f"verify cannot run the unpatched {cls} on these inputs "
            f"({sentence(error)}); pass inputs= with the arguments of its forward."
        ) from error
    found = _spoiled(runs, probe.plain, probe.length)
    if found:
        raise UntestableError(
            f"verify: the unpatched {cls} itself gives {found[0]} in {found[1]} on these inputs, "
            "so nothing can be told of the patch; pass inputs= for which it is finite, or mend "
            "its weights."
        )
    for key, batch in probe.padded.items():
        if isinstance(batch, str):
            continue
        try:
            runs.outputs(batch.inputs, probe.length)
        except Exception as error:
            why = f"with {batch.what} the unpatched model raises {sentence(error)}"
            probe = probe.without(key, why)
            continue
        found = _spoiled(runs, batch, probe.length)
        if found:
            why = f"with {batch.what} the unpatched model itself gives {found[0]} in {found[1]}"
            probe = probe.without(key, why)
    return probe


def _spoiled(runs: Runs, batch: Batch, length: int | None) -> tuple[str, str] | None:
    """What the output that tests compare holds beside numbers, and its name; None if nothing."""
    output = runs.outputs(batch.inputs, length)
    what = not_finite(_shown(output, batch))
    return (what, runs.name(batch.inputs, length)) if what else None


def _shown(tensor: Tensor, batch: Batch) -> Tensor:
    seen = batch.seen
    return tensor if seen is None or tensor.shape[:2] != seen.shape else tensor[seen]


def others_spoiled(runs: Runs, probe: Probe) -> str:
    """Which further outputs of the unpatched model hold NaN or infinity; empty if none."""
    found = []
    for name, tensor in runs.named(probe.plain.inputs, probe.length).items():
        what = not_finite(_shown(tensor, probe.plain))
        if what:
            found.append(f"{what} in {name}")
    return ", ".join(found)


def is_steady(runs: Runs, probe: Probe) -> bool:
    """Whether a model gives the same again for the same inputs."""
    first = runs.outputs(probe.plain.inputs, probe.length)
    return difference([first], [Runs(runs.root).outputs(probe.plain.inputs, probe.length)]) == 0


def require_finite(patched: Runs, unpatched: Runs, probe: Probe) -> None:
    """Raise ValueError for outputs that only the patch makes NaN or infinite."""
    for batch in (probe.plain, probe.main):
        own = unpatched.named(batch.inputs, probe.length)
        for name, tensor in patched.named(batch.inputs, probe.length).items():
            before = own.get(name)
            if before is None or before.shape != tensor.shape:
                before = torch.zeros_like(tensor)
            bad = _shown(before.isfinite() & ~tensor.isfinite(), batch)
            if bool(bad.any()):
                raise ValueError(
                    f"verify: the patched model's output {name} holds NaN or infinity where the "
                    "unpatched model's does not; check the learned values and the variant's "
                    "options."
                )
