"""Prove on the running model that a patch kept causality and padding and reached every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf import softmax_hook
from attnvariants.hf.cached import cached_difference, packed_difference
from attnvariants.hf.holder import CHILD, AttnVariant
from attnvariants.hf.judge import (
    Figures,
    judge_cache,
    judge_hidden,
    judge_leak,
    judge_packed,
    judge_padding,
)
from attnvariants.hf.outputs import (
    Case,
    difference,
    meaning_of,
    outputs_of,
    per_token,
    run,
    sentence,
    tensors_in,
)
from attnvariants.hf.probe import Probe, given_probe, made_probe


@dataclass(frozen=True)
class Verification:
    """Figures of a self-test; the differences are relative to the largest output.

    A figure is None if its test does not apply; its note says why, or what was compared.

    Attributes:
        modules: number of patched modules.
        reached: number of those that computed their variant; the others were not run at all.
        identity: largest difference from the unpatched model with softmax in place of the variant.
        leak: largest change before a changed token.
        padding: largest difference of a left-padded row from the unpadded one.
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


TITLES = {
    "identity": "identity",
    "leak": "future leak",
    "padding": "left padding",
    "hidden": "hidden tokens",
    "cache": "cache",
    "packed": "packed documents",
}


def verify_model(
    model: nn.Module,
    configs: list[tuple[Any, str]],
    inputs: Mapping[str, Tensor] | None,
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
    with _quiet(root):
        with _unpatched(configs):
            if inputs is not None:
                batch = given_probe(root, inputs)
            else:
                batch = made_probe(root, seed, lambda tried: _outputs(root, tried, None))
            case = Case("own", batch.inputs, batch.seen, _with_other_hidden(batch))
            try:
                base = _figures(root, batch)
                own = outputs_of(root, case)
                parts = meaning_of(root, case, own)
            except Exception as error:
                raise ValueError(
                    f"verify cannot run the unpatched {type(root).__name__} on these inputs "
                    f"({sentence(error)}); pass inputs= with the arguments of its forward."
                ) from error
            steady = difference(own, outputs_of(root, case)) == 0
        with _watching(patched_modules) as ran, _watching(holders) as reached:
            patched = _figures(root, batch)
        _require_reached(holders, ran, reached)
        if not patched.finite:
            raise ValueError(
                "verify: the patched model's outputs hold NaN or infinity; check the learned "
                "values and the variant's options."
            )
        routed = _routed(root)
        # routed experts regroup tokens, and attention to an encoder shares sums between rows
        shared = routed or getattr(root.config, "is_encoder_decoder", False)
        slack = tolerance / 100 if shared else 0.0

        def identity() -> tuple[float | None, str]:
            if not steady:
                return None, "the unpatched model's outputs are random"
            if half and routed:
                return None, "half precision sends tokens to other experts"
            return _judge_identity(
                root, case, (own, parts), configs, 4 * tolerance if half else tolerance
            )

        judges: dict[str, Callable[[], tuple[float | None, str]]] = {
            "leak": lambda: judge_leak(patched, base, slack),
            "padding": lambda: judge_padding(patched, base, tolerance),
            "hidden": lambda: judge_hidden(patched, base, slack),
            "cache": lambda: judge_cache(patched, base, tolerance),
            "packed": lambda: judge_packed(patched, base, tolerance),
            "identity": identity,
        }
        figures: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        failed = []
        for name, judge in judges.items():
            try:
                figures[name], notes[name] = judge()
            except ValueError as error:
                if strict:
                    raise
                figures[name], notes[name] = getattr(patched, name, None), str(error)
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
        raise ValueError(
            f"verify: none of the {len(holders)} patched modules was run by these inputs; pass "
            "inputs= that use them."
        )


def _routed(root: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "experts" for name, _ in root.named_modules())


def _judge_identity(
    root: nn.Module,
    case: Case,
    own: tuple[list[Tensor], list[Tensor | None]],
    configs: list[tuple[Any, str]],
    tolerance: float,
) -> tuple[float | None, str]:
    """Softmax by the patch against the model's own operator, else against its eager one."""
    with _softmax(root):
        patched = outputs_of(root, case)
    expected, parts = own
    change, note = difference(expected, patched, parts), "softmax in place of the variant"
    if not change <= tolerance:
        # sdpa and eager of some models differ; eager is what their authors wrote
        with _unpatched([(config, "eager") for config, _ in configs]):
            change = min(change, difference(outputs_of(root, case), patched, parts))
        note += ", against eager attention"
    if not change <= tolerance:
        raise ValueError(
            f"verify: with softmax in place of the variant the model's outputs differ by "
            f"{change:.3g} of the largest from the unpatched model's, more than {tolerance:g}; "
            "the mask or another argument does not reach the patched modules as it should."
        )
    return change, note


def _figures(root: nn.Module, batch: Probe) -> Figures:
    changed = batch.changed
    length = batch.inputs[changed].shape[1] if changed else None
    first = _outputs(root, batch.inputs, length)
    if changed is None or first.dim() < 3 or first.shape[1] != length:
        # without outputs for every token, a padded row may mean nothing
        shown = first if batch.seen is None or first.dim() < 2 else first[:1]
        return Figures(bool(torch.isfinite(shown).all()))
    tokens = batch.inputs[changed]
    assert length is not None
    padded_side = batch.pad if changed == "input_ids" else 0
    seen = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if batch.pad:
        seen[1, :padded_side] = False
    all_finite = bool(torch.isfinite(first[seen]).all())
    largest = first[seen].abs().max().clamp(min=torch.finfo(first.dtype).tiny)

    def change(rows: Tensor, other: dict[str, Tensor]) -> float | None:
        if not bool(rows.any()):
            return 0.0
        second = _outputs(root, {**batch.inputs, **other}, length)
        if second.shape != first.shape:
            return None
        return float((second[rows] - first[rows]).abs().max() / largest)

    leaks: list[float | None] = []
    for start in {length - 1, max(length // 2, padded_side + 1)}:
        other = tokens.clone()
        other[:, start:] = _other(tokens[:, start:], batch.allowed)
        before = seen.clone()
        before[:, start:] = False
        leaks.append(change(before, {changed: other}))
    known = [value for value in leaks if value is not None]
    leak = max(known) if len(known) == len(leaks) else None
    hidden = None
    changed_inputs = _with_other_hidden(batch)
    if changed_inputs is not None:
        hidden = change(seen, changed_inputs)
    padding = None
    if batch.short is not None:
        alone = _outputs(root, batch.short, length if padded_side == 0 else length - padded_side)
        if alone.shape == first[1:2, padded_side:].shape:
            padding = float((first[1:2, padded_side:] - alone).abs().max() / largest)
    cache, cache_note = cached_difference(root, batch, first, seen)
    packed = packed_difference(root, batch)
    return Figures(all_finite, leak, padding, hidden, cache, cache_note, packed)


def _with_other_hidden(batch: Probe) -> dict[str, Tensor] | None:
    """The inputs with other tokens where padding hides them; None without padding."""
    if not batch.pad:
        return None
    tokens = batch.inputs["input_ids"].clone()
    tokens[1, : batch.pad] = _other(tokens[1, : batch.pad], batch.allowed)
    return {**batch.inputs, "input_ids": tokens}


def _other(tokens: Tensor, allowed: Tensor | None) -> Tensor:
    """Tokens that differ from the given ones everywhere."""
    first, second = (0, 1) if allowed is None else allowed[:2].tolist()
    return torch.where(tokens == first, second, first).to(tokens.dtype)


def _outputs(root: nn.Module, inputs: dict[str, Tensor], length: int | None) -> Tensor:
    """The output for every token, `[batch, tokens, width]`, else any, in float32 or wider."""
    result: Any = None
    found = None
    for extra in ({}, {"output_hidden_states": True}):
        result = run(root, inputs, **extra)
        found = per_token(result, length) if length is not None else None
        if found is not None or length is None:
            break
    if found is None:
        found = next(tensors_in(result), None)
    if found is None:
        raise ValueError(f"{type(result).__name__} holds no floating tensor")
    return found if found.dtype == torch.float64 else found.float()


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


@contextmanager
def _softmax(root: nn.Module) -> Iterator[None]:
    """Softmax in place of every variant, for as long as it takes."""
    holders = [module for module in root.modules() if isinstance(module, AttnVariant)]
    before = [(holder.variant, holder.options, holder.learned, holder.impl) for holder in holders]
    try:
        for holder in holders:
            holder.variant, holder.options, holder.learned, holder.impl = "softmax", {}, (), "auto"
        yield
    finally:
        for holder, values in zip(holders, before, strict=True):
            holder.variant, holder.options, holder.learned, holder.impl = values


@contextmanager
def _quiet(root: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are restored."""
    modes = [(module, module.training) for module in root.modules()]
    devices = {p.device.index for p in root.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        root.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _watching(modules: dict[str, nn.Module]) -> Iterator[set[str]]:
    """The names of the modules that were called inside."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in modules.items()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _unpatched(configs: list[tuple[Any, str]]) -> Iterator[None]:
    """The model with its previous operators, for as long as it takes."""
    ours = [(config, config._attn_implementation) for config, _ in configs]
    try:
        for config, previous in configs:
            config._attn_implementation_internal = previous
        with softmax_hook.paused():
            yield
    finally:
        for config, now in ours:
            config._attn_implementation_internal = now
