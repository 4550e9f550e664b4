"""Run a model before and after a patch and compare everything it returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnvariants.hf.find import Target, attention_modules
from attnvariants.hf.holder import CHILD
from attnvariants.hf.inputs import Sample, parameters, samples
from attnvariants.hf.names import implementation_of
from attnvariants.hf.outputs import Case, outputs_of, sentence
from attnvariants.hf.patcher import Patch, patch


@dataclass
class Calls:
    """Names of the patched modules that ran, and of those whose variant was read."""

    modules: set[str]
    holders: set[str]


def runnable(model: nn.Module, length: int | None = None) -> tuple[Sample | None, str]:
    """The first sample that the model runs; None and why the likeliest failed if there is none."""
    why = ""
    for sample in samples(model, length=length):
        try:
            found = outputs_of(model, Case("plain", sample.inputs))
        except Exception as error:
            why = why or f"{sample.what}: {sentence(error)}"
            continue
        if found:
            return sample, ""
        why = why or f"{sample.what}: it returns no floating tensor"
    return None, why or f"its inputs are {', '.join(list(parameters(model))[1:5])}"


def cases_of(model: nn.Module, sample: Sample) -> Iterator[Case]:
    """A sample as it is, then with row 1 padded left, then right."""
    yield Case("plain", sample.inputs)
    accepts = parameters(model)
    if "input_ids" not in sample.tokens or "attention_mask" not in accepts:
        return
    tokens = sample.inputs["input_ids"]
    pad = tokens.shape[1] // 3
    for side, hidden in (("left-padded", slice(0, pad)), ("right-padded", slice(-pad, None))):
        mask = torch.ones_like(tokens)
        mask[1, hidden] = 0
        inputs = {**sample.inputs, "attention_mask": mask}
        changed = tokens.clone()
        changed[1, hidden] = tokens[1, hidden].roll(1)
        if "decoder_attention_mask" in accepts and "decoder_input_ids" in sample.inputs:
            inputs["decoder_attention_mask"] = mask
        yield Case(side, inputs, mask.bool(), {**inputs, "input_ids": changed})


def patch_most(model: nn.Module, variant: Any, **more: Any) -> Patch:
    """Patch all attention of a model, and what can be patched where that is refused.

    Raises:
        ValueError: not even its text part can be patched.
    """
    able = {target.name for target in attention_modules(model) if not target.reason}
    for chosen in (lambda name, module: True, lambda name, module: name in able):
        try:
            return patch(model, variant, layers=chosen, **more)
        except ValueError:
            continue
    return patch(model, variant, **more)


def parts_beside(model: nn.Module, names: set[str]) -> list[tuple[str, nn.Module]]:
    """Models inside a model that hold the named modules, smallest first, none twice."""
    from transformers import PreTrainedModel

    inner = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    }
    found: dict[str, nn.Module] = {}
    for name in sorted(names):
        around = [outer for outer in inner if name == outer or name.startswith(outer + ".")]
        for outer in sorted(around, key=len, reverse=True)[:1]:
            found[outer] = inner[outer]
    return list(found.items())


def ran_in(model: nn.Module, targets: list[Target], case: Case) -> set[str]:
    """Names of the attention modules that a case runs."""
    ran: set[str] = set()
    hooks = [
        target.module.register_forward_hook(lambda *_, name=target.name: ran.add(name))
        for target in targets
    ]
    try:
        outputs_of(model, case)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


@contextmanager
def watching(model: nn.Module) -> Iterator[Calls]:
    """Which patched modules are called inside, and which of their variants are read."""
    calls = Calls(set(), set())
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, CHILD):
            for found, thing in ((calls.modules, module), (calls.holders, getattr(module, CHILD))):
                hook = lambda *_, found=found, name=name: found.add(name)  # noqa: E731
                hooks.append(thing.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def state_of_model(model: nn.Module) -> tuple[Any, ...]:
    """What a removed patch must have put back, besides outputs."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    operators = [implementation_of(config) for config in configs]
    fields = [str(config.to_dict()) for config in configs[:1] if hasattr(config, "to_dict")]
    return list(model.state_dict()), fields, operators
