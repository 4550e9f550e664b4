"""Prove on the running model that a patch kept causality and padding and reached every module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.holder import CHILD
from attnvariants.hf.probe import Probe, given_probe, made_probe, parameters

NEARLY_CAUSAL = 1e-5


@dataclass(frozen=True)
class Verification:
    """Figures of a self-test; the differences are relative to the largest output.

    Attributes:
        modules: number of patched modules.
        reached: number of those that computed their variant; the others were not run at all.
        leak: largest change before a changed token, or None if the test does not apply.
        leak_note: why it does not apply, or what was compared.
        padding: largest difference of a left-padded row, or None if the test does not apply.
        padding_note: likewise.
        tolerance: what `padding` was held to.
    """

    modules: int
    reached: int
    leak: float | None
    leak_note: str
    padding: float | None
    padding_note: str
    tolerance: float

    def __str__(self) -> str:
        def line(name: str, value: float | None, note: str) -> str:
            return f"{name}: {'not applicable' if value is None else f'{value:.3g}'} ({note})"

        return "\n".join(
            [
                f"reached: {self.reached} of {self.modules} patched modules",
                line("future leak", self.leak, self.leak_note),
                line("left padding", self.padding, self.padding_note),
            ]
        )


def verify_model(
    model: nn.Module,
    configs: list[tuple[Any, str]],
    inputs: Mapping[str, Tensor] | None,
    tolerance: float | None,
    seed: int,
) -> Verification:
    """See `Patch.verify`; `configs` are the switched configs with their previous operators."""
    root = _root(model)
    if tolerance is None:
        half = next(root.parameters()).dtype in (torch.float16, torch.bfloat16)
        tolerance = 5e-2 if half else 1e-4
    batch = given_probe(root, inputs) if inputs is not None else made_probe(root, seed)
    patched_modules = {
        name: module for name, module in root.named_modules() if hasattr(module, CHILD)
    }
    holders = {name: getattr(module, CHILD) for name, module in patched_modules.items()}
    with _quiet(root):
        with _unpatched(configs):
            try:
                base = _figures(root, batch, seed)
            except Exception as error:
                raise ValueError(
                    f"verify cannot run the unpatched {type(root).__name__} on these inputs "
                    f"({type(error).__name__}: {error}); pass inputs= with the arguments of its "
                    "forward."
                ) from error
        with _watching(patched_modules) as ran, _watching(holders) as reached:
            patched = _figures(root, batch, seed)

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
    if not patched.finite:
        raise ValueError(
            "verify: the patched model's outputs hold NaN or infinity; check the learned values "
            "and the variant's options."
        )
    leak, leak_note = _judge_leak(patched, base, _slack(root, tolerance))
    padding, padding_note = _judge_padding(patched, base, tolerance)
    return Verification(
        len(holders), len(reached), leak, leak_note, padding, padding_note, tolerance
    )


@dataclass(frozen=True)
class _Figures:
    finite: bool
    leak: float | None
    padding: float | None


def _slack(root: nn.Module, tolerance: float) -> float:
    """How much rounding may differ when another token changes: routed experts regroup tokens."""
    routed = any(name.rpartition(".")[2] == "experts" for name, _ in root.named_modules())
    return tolerance / 100 if routed else 0.0


def _judge_leak(patched: _Figures, base: _Figures, slack: float) -> tuple[float | None, str]:
    if patched.leak is None or base.leak is None:
        return None, "no tokens to change, or no output for each of them"
    if base.leak > NEARLY_CAUSAL:
        return None, f"the unpatched model is not causal: it changes by {base.leak:.3g}"
    if patched.leak > max(10 * base.leak, slack):
        raise ValueError(
            f"verify: a future token changes outputs before it by {patched.leak:.3g} of the "
            f"largest output, where the unpatched model changes by {base.leak:.3g}; the mask does "
            "not reach the patched modules."
        )
    return patched.leak, "change of outputs before a changed token"


def _judge_padding(patched: _Figures, base: _Figures, tolerance: float) -> tuple[float | None, str]:
    if patched.padding is None or base.padding is None:
        return None, "no left-padded batch of tokens"
    if base.padding > tolerance:
        return None, f"the unpatched model differs by {base.padding:.3g} itself"
    if not patched.padding <= tolerance:
        raise ValueError(
            f"verify: a left-padded row differs from the unpadded one by {patched.padding:.3g} of "
            f"the largest output, more than {tolerance:g}; the unpatched model differs by "
            f"{base.padding:.3g}. The padding mask does not reach the patched modules, or the "
            "variant counts hidden keys."
        )
    return patched.padding, "left-padded row against the unpadded one"


def _figures(root: nn.Module, batch: Probe, seed: int) -> _Figures:
    def run(inputs: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(seed)
        return _outputs(root, inputs, batch)

    first = run(batch.inputs)
    changed = batch.changed
    tokens = batch.inputs[changed] if changed else None
    if changed is None or tokens is None or first.dim() < 3 or first.shape[1] != tokens.shape[1]:
        return _Figures(bool(torch.isfinite(first).all()), None, None)
    length = tokens.shape[1]
    padded_side = batch.pad if changed == "input_ids" else 0
    seen = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if batch.pad:
        seen[1, :padded_side] = False
    finite = bool(torch.isfinite(first[seen]).all())
    largest = first[seen].abs().max().clamp(min=torch.finfo(first.dtype).tiny)

    leak = 0.0
    for start in {length - 1, max(length // 2, padded_side + 1)}:
        other = tokens.clone()
        other[:, start:] = _other(tokens[:, start:], batch.allowed)
        second = run({**batch.inputs, changed: other})
        before = seen.clone()
        before[:, start:] = False
        if bool(before.any()):
            change = (second[before] - first[before]).abs().max() / largest
            leak = max(leak, float(change))
    padding = None
    if batch.short is not None:
        alone = run(batch.short)
        padding = float((first[1:2, padded_side:] - alone).abs().max() / largest)
    return _Figures(finite, leak, padding)


def _other(tokens: Tensor, allowed: Tensor | None) -> Tensor:
    """Tokens that differ from the given ones everywhere."""
    first, second = (0, 1) if allowed is None else allowed[:2].tolist()
    return torch.where(tokens == first, second, first).to(tokens.dtype)


def _outputs(root: nn.Module, inputs: dict[str, Tensor], batch: Probe) -> Tensor:
    """The output for every token, `[batch, tokens, width]`, in float32 or wider."""
    arguments: dict[str, Any] = dict(inputs)
    if "use_cache" in parameters(root):
        arguments["use_cache"] = False
    length = inputs[batch.changed].shape[1] if batch.changed else None
    fallback = None
    for extra in ({}, {"output_hidden_states": True}):
        result = root(**arguments, **extra, return_dict=True)
        for tensor in _floats(result):
            if length is None or (tensor.dim() >= 3 and tensor.shape[1] == length):
                return tensor if tensor.dtype == torch.float64 else tensor.float()
            fallback = tensor if fallback is None else fallback
    if fallback is None:
        raise ValueError(f"{type(result).__name__} holds no floating tensor")
    return fallback


def _floats(result: Any) -> Iterator[Tensor]:
    """Floating tensors of a model's output, the likeliest to be one for every token first."""
    for name in ("logits", "last_hidden_state", "decoder_hidden_states", "hidden_states", *result):
        value = getattr(result, name, None)
        value = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value


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
        yield
    finally:
        for config, now in ours:
            config._attn_implementation_internal = now
