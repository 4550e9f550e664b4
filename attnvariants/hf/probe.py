"""Inputs that the self-test of a patch runs a model on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import Sample, parameters, samples, text_config
from attnvariants.hf.outputs import sentence


@dataclass(frozen=True)
class Probe:
    """Inputs of the model's forward, the tokens that the leak test changes, and the padding.

    `pad` is the number of padding tokens left of row 1; `changed` names the argument whose tokens
    are changed; `allowed` are tokens without a special meaning; `short` is row 1 alone, without
    its padding.
    """

    inputs: dict[str, Tensor]
    changed: str | None = None
    allowed: Tensor | None = None
    pad: int = 0
    short: dict[str, Tensor] | None = None

    @property
    def seen(self) -> Tensor | None:
        """`[batch, tokens]` bool, False at padding; None without any."""
        if not self.pad:
            return None
        mask = torch.ones_like(self.inputs["input_ids"], dtype=torch.bool)
        mask[1, : self.pad] = False
        return mask


def made_probe(root: nn.Module, seed: int, runs: Callable[[dict[str, Tensor]], Any]) -> Probe:
    """Small random inputs of the model's own kind.

    Args:
        root: the model.
        seed: of the random numbers.
        runs: runs the model as it was before the patch; raises if it does not take the inputs.

    Raises:
        ValueError: the model runs none of the inputs that are tried.
    """
    why = ""
    for sample in samples(root, seed):
        for probe in _probes(root, sample):
            try:
                runs(probe.inputs)
            except Exception as error:
                why = why or sentence(error)
            else:
                return probe
    main = getattr(root, "main_input_name", "input_ids")
    raise ValueError(
        f"verify cannot make inputs for {type(root).__name__}, whose input is {main}; pass "
        f"inputs= with the arguments of its forward{f' ({why})' if why else ''}."
    )


def _probes(root: nn.Module, sample: Sample) -> Iterator[Probe]:
    """A sample as a probe, padded if it can be."""
    if not sample.tokens:
        yield Probe(sample.inputs)
        return
    allowed = sample.allowed.to(sample.inputs[sample.tokens[-1]].device)
    if "input_ids" in sample.tokens and "attention_mask" in parameters(root):
        yield _padded(root, sample.inputs, allowed)
    yield Probe(sample.inputs, sample.tokens[-1], allowed)


def given_probe(root: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    """The caller's inputs; padded as well if they are nothing but tokens.

    Raises:
        ValueError: there are fewer than two tokens to change.
    """
    given = dict(inputs)
    changed = next((key for key in ("decoder_input_ids", "input_ids") if key in given), None)
    if changed is None:
        return Probe(given)
    if given[changed].dim() != 2 or given[changed].shape[1] < 2:
        raise ValueError(
            f"verify needs {changed} of shape [batch, tokens] with at least 2 tokens, got "
            f"{list(given[changed].shape)}."
        )
    tokens_only = set(given) <= {"input_ids", "decoder_input_ids"} and "input_ids" in given
    able = tokens_only and "attention_mask" in parameters(root)
    if able and all(value.shape[1] >= 4 for value in given.values()):
        return _padded(root, {key: value[:1].expand(2, -1) for key, value in given.items()}, None)
    return Probe(given, changed)


def _padded(root: nn.Module, inputs: dict[str, Tensor], allowed: Tensor | None) -> Probe:
    """A batch whose row 1 is left-padded by a third, and that row alone without padding."""
    changed = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    accepts = parameters(root)
    tokens = inputs["input_ids"].clone()
    pad = tokens.shape[1] // 3
    fill = getattr(text_config(root.config), "pad_token_id", None)
    tokens[1, :pad] = fill if isinstance(fill, int) and fill >= 0 else 0
    mask = torch.ones_like(tokens)
    mask[1, :pad] = 0
    batch = {**inputs, "input_ids": tokens, "attention_mask": mask}
    if any(value.shape[0] != 2 for value in batch.values()):
        return Probe(batch, changed, allowed, pad)
    short = {key: value[1:2] for key, value in batch.items()}
    for key in ("input_ids", "attention_mask"):
        short[key] = short[key][:, pad:]
    if "position_ids" in accepts:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        short["position_ids"] = batch["position_ids"][1:2, pad:]
    return Probe(batch, changed, allowed, pad, short)
