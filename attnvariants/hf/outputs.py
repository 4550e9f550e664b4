"""What a model returns: run it, collect its tensors, compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import parameters

# Where models keep what they return for every token, the likeliest first.
_PER_TOKEN = ("logits", "last_hidden_state", "decoder_hidden_states", "hidden_states")


@dataclass(frozen=True)
class Case:
    """Arguments for a model, and what of its outputs means something.

    Attributes:
        name: of the case, for reports.
        inputs: arguments of the forward.
        seen: `[batch, tokens]` bool, or None for all positions.
        other: the same arguments with other tokens where `seen` is False, or None.
    """

    name: str
    inputs: Mapping[str, Any]
    seen: Tensor | None = None
    other: Mapping[str, Any] | None = None


def run(model: nn.Module, inputs: Mapping[str, Any], **more: Any) -> Any:
    """What a model returns, without gradients, a cache or a change of the random state."""
    arguments: dict[str, Any] = {**inputs, **more}
    accepts = parameters(model)
    if "use_cache" in accepts:
        arguments.setdefault("use_cache", False)
    if any(name in accepts for name in ("return_dict", "kwargs", "super_kwargs")):
        arguments.setdefault("return_dict", True)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        return model(**arguments)


def outputs_of(model: nn.Module, case: Case) -> list[Tensor]:
    """All floating tensors that a forward returns, hidden positions set to 0."""
    found = list(tensors_in(run(model, case.inputs)))
    seen = case.seen
    if seen is None:
        return found
    return [
        tensor.masked_fill(~_wide(seen, tensor), 0) if tensor.shape[:2] == seen.shape else tensor
        for tensor in found
    ]


def meaning_of(model: nn.Module, case: Case, own: list[Tensor]) -> list[Tensor | None]:
    """Which parts of a model's own outputs hidden tokens cannot change; None for all.

    Some models pool a row that is padding, or return rows besides those of the tokens.
    """
    if case.seen is None or case.other is None:
        return [None] * len(own)
    again = outputs_of(model, Case(case.name, case.other, case.seen))
    parts: list[Tensor | None] = []
    for one, other in zip(own, again, strict=True):
        if one.shape[:2] == case.seen.shape or one.shape != other.shape:
            parts.append(None)
            continue
        change = (one - other).abs().flatten(min(2, one.dim() - 1))
        parts.append(change.amax(-1) <= 1e-5 * one.abs().max())
    return parts


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of the first dimensions of a tensor, ready to be broadcast to it."""
    return mask.reshape((*mask.shape, *[1] * (like.dim() - mask.dim())))


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """The floating tensors in a model's output, which may be nested."""
    if isinstance(thing, Tensor):
        if thing.is_floating_point() and thing.numel():
            yield thing
    elif isinstance(thing, Mapping):
        for name, value in thing.items():
            # some models return attention weights unasked, which a variant does not
            if "attentions" not in str(name):
                yield from tensors_in(value)
    elif isinstance(thing, (tuple, list)):
        for value in thing:
            yield from tensors_in(value)


def named_tensors(result: Any) -> dict[str, Tensor]:
    """The floating tensors in a model's output by name, those of a list by place."""
    found: dict[str, Tensor] = {}
    items = result.items() if isinstance(result, Mapping) else [("its output", result)]
    for name, value in items:
        tensors = list(tensors_in({name: value}))
        for place, tensor in enumerate(tensors):
            found[f"{name}[{place}]" if len(tensors) > 1 else str(name)] = tensor
    return found


def not_finite(tensor: Tensor) -> str:
    """What a tensor holds beside numbers: "NaN", "infinity", or nothing."""
    if bool(tensor.isnan().any()):
        return "NaN"
    return "infinity" if bool(tensor.isinf().any()) else ""


def per_token(result: Any, length: int) -> Tensor | None:
    """The output for every token, `[batch, length, width]`; None if there is none."""
    named = [getattr(result, name, None) for name in _PER_TOKEN]
    ordered = [value[-1] if isinstance(value, tuple) and value else value for value in named]
    for tensor in tensors_in([*ordered, result]):
        if tensor.dim() >= 3 and tensor.shape[1] == length:
            return tensor
    return None


def difference(
    expected: list[Tensor], got: list[Tensor], parts: list[Tensor | None] | None = None
) -> float:
    """Largest difference of two lists of tensors, each relative to the largest expected value.

    Args:
        expected, got: the tensors.
        parts: which parts of each to compare, see `meaning_of`.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        return float("inf")
    worst = 0.0
    for one, other, part in zip(expected, got, parts or [None] * len(got), strict=True):
        one, other = one.double(), other.double()
        if part is not None:
            one, other = (x.masked_fill(~_wide(part, x), 0) for x in (one, other))
        same = (one == other) | (one.isnan() & other.isnan())
        if bool(same.all()):
            continue
        finite = one[one.isfinite()].abs()
        size = max(float(finite.max()), 1e-30) if finite.numel() else 1.0
        change = float(torch.where(same, 0.0, (one - other).abs()).max()) / size
        worst = change if not change <= worst else worst
    return worst


def sentence(error: BaseException) -> str:
    """An error on one line; the kind of those that are not made for readers."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
