"""Inputs that the self-test of a patch runs a model on, whole and with tokens hidden."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import (
    device_of,
    parameters,
    samples,
    special_tokens,
    text_config,
)
from attnvariants.hf.outputs import sentence
from attnvariants.hf.padding import (
    LEFT,
    MASKS,
    Batch,
    Short,
    free_tokens,
    other_tokens,
    padded_batches,
)
from attnvariants.hf.reasons import UntestableError

_OF_TOKENS = {*MASKS, *MASKS.values(), "position_ids"}


@dataclass(frozen=True)
class Probe:
    """What the self-test runs.

    Attributes:
        plain: the inputs whole, as they were given or made.
        changed: the argument whose tokens are changed; None if none holds tokens.
        free: `[batch, tokens]` bool of the tokens that may be changed.
        allowed: two tokens or more without a special meaning; None for embeddings.
        padded: by side and argument, the inputs with tokens hidden; or why there are none.
    """

    plain: Batch
    changed: str | None = None
    free: Tensor | None = None
    allowed: Tensor | None = None
    padded: Mapping[tuple[str, str], Batch | str] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Number of the changed tokens in a row; None without any."""
        return None if self.changed is None else int(self.plain.inputs[self.changed].shape[1])

    @property
    def source(self) -> str | None:
        """The argument whose tokens padding hides: the encoder's if there is one."""
        return next((name for name in reversed(MASKS) if name in self.plain.inputs), None)

    @property
    def main(self) -> Batch:
        """The left-padded inputs, or the whole ones where there are no padded ones."""
        padded = self.padded.get((LEFT, self.source or ""))
        return padded if isinstance(padded, Batch) else self.plain

    @property
    def more(self) -> str:
        """The arguments that are more than tokens, which cannot be cut as they can."""
        return ", ".join(sorted(set(self.plain.inputs) - _OF_TOKENS))

    def changed_at(self, where: Tensor, batch: Batch) -> dict[str, Any]:
        """The inputs of a batch with other tokens at some places."""
        assert self.changed is not None
        tokens = batch.inputs[self.changed]
        return {**batch.inputs, self.changed: other_tokens(tokens, where, self.allowed)}

    def without(self, key: tuple[str, str], why: str) -> Probe:
        """The same without a padded batch, and why."""
        return replace(self, padded={**self.padded, key: why})

    def double(self) -> Probe:
        """The same with floating inputs in float64."""
        padded = {
            key: value if isinstance(value, str) else _double(value)
            for key, value in self.padded.items()
        }
        return replace(self, plain=_double(self.plain), padded=padded)


def made_probe(root: nn.Module, seed: int, runs: Callable[[dict[str, Any]], Any]) -> Probe:
    """Small random inputs of the model's own kind.

    Args:
        root: the model.
        seed: of the random numbers.
        runs: runs the model as it was before the patch; raises if it does not take the inputs.

    Raises:
        UntestableError: the model runs none of the inputs that are tried.
    """
    why = ""
    for sample in samples(root, seed):
        tries = [sample.inputs]
        if "input_ids" in sample.inputs and "attention_mask" in parameters(root):
            # some models do not run without a mask
            mask = torch.ones_like(sample.inputs["input_ids"])
            tries.append({**sample.inputs, "attention_mask": mask})
        for inputs in tries:
            try:
                runs(inputs)
            except Exception as error:
                why = why or sentence(error)
                continue
            allowed = sample.allowed.to(device_of(root))
            if sample.tokens:
                return _probe(root, inputs, sample.tokens[-1], allowed)
            return _probe(root, inputs, _changed(inputs), None)
    main = getattr(root, "main_input_name", "input_ids")
    raise UntestableError(
        f"verify cannot make inputs for {type(root).__name__}, whose input is {main}; pass "
        f"inputs= with the arguments of its forward{f' ({why})' if why else ''}."
    )


def given_probe(root: nn.Module, inputs: Mapping[str, Any]) -> Probe:
    """The caller's inputs, whole, and what can be hidden of them.

    Raises:
        ValueError: there are fewer than two tokens to change.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    changed = _changed(given)
    if changed is None:
        return Probe(Batch(given))
    tokens = given[changed]
    dims = 3 if tokens.is_floating_point() else 2
    if tokens.dim() != dims or tokens.shape[1] < 2:
        shape = "[batch, tokens, width]" if dims == 3 else "[batch, tokens]"
        raise ValueError(
            f"verify needs {changed} of shape {shape} with at least 2 tokens, got "
            f"{list(tokens.shape)}."
        )
    if set(given) <= set(MASKS) and all(len(value) == 1 for value in given.values()):
        # a second row, which padding tells from the first
        given = {name: torch.cat([value, value]) for name, value in given.items()}
    return _probe(root, given, changed, None)


def _changed(inputs: Mapping[str, Any]) -> str | None:
    return next((name for name in MASKS if isinstance(inputs.get(name), Tensor)), None)


def _probe(
    root: nn.Module, inputs: dict[str, Any], changed: str | None, allowed: Tensor | None
) -> Probe:
    if changed is None:
        return Probe(Batch(inputs))
    special = special_tokens(root.config) | special_tokens(text_config(root.config))
    tokens = inputs[changed]
    free = free_tokens(tokens, special)
    if tokens.is_floating_point():
        allowed = None
    elif allowed is None:
        allowed = _plain_tokens(root, tokens[free], special)
    mask = inputs.get(MASKS[changed])
    seen = None
    if isinstance(mask, Tensor) and mask.shape == tokens.shape[:2] and not bool(mask.all()):
        seen = mask != 0
        free = free & seen
    padded = padded_batches(root, inputs, changed, special, allowed)
    return Probe(Batch(inputs, seen=seen), changed, free, allowed, padded)


def _plain_tokens(root: nn.Module, present: Tensor, special: set[int]) -> Tensor:
    """Tokens without a special meaning: two that the inputs hold, else some of the vocabulary."""
    found = present.unique()
    if found.numel() > 1:
        return found
    most = getattr(text_config(root.config), "vocab_size", None) or 2
    rest = [token for token in range(min(most, 4096)) if token not in special]
    return torch.tensor(rest if len(rest) > 1 else [0, 1], device=present.device)


def _double(batch: Batch) -> Batch:
    def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }

    short = batch.short
    if isinstance(short, Short):
        short = replace(short, inputs=double(short.inputs))
    other = None if batch.other is None else double(batch.other)
    return replace(batch, inputs=double(batch.inputs), other=other, short=short)
