"""Whether a model with a cache, or with packed documents, computes what it does without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnvariants.hf.inputs import parameters
from attnvariants.hf.names import cache_argument, cache_of, with_cache
from attnvariants.hf.outputs import per_token, run
from attnvariants.hf.probe import Probe

# Slots that a static cache has beyond the tokens.
SPARE = 5


def cached_difference(
    root: nn.Module, batch: Probe, first: Tensor, seen: Tensor
) -> tuple[float | None, str]:
    """Largest difference of outputs with a cache from `first`, relative to the largest.

    A growing cache gets the tokens in two parts, so that queries are fewer than keys; a static
    one gets them at once, so that keys are more than queries are meant to see.

    Returns:
        The difference and what was compared; None and why if the model has no such cache.
    """
    accepts = parameters(root)
    decoder = batch.changed == "input_ids" and not getattr(root.config, "is_encoder_decoder", False)
    if not decoder or "use_cache" not in accepts or cache_argument(accepts) is None:
        return None, "not a decoder with a cache"
    tokens = batch.inputs["input_ids"]
    if set(batch.inputs) - {"input_ids", "attention_mask", "position_ids"}:
        return None, "its inputs are more than tokens"
    found: list[tuple[float, str]] = []
    why = "no cache of it runs"
    for name, attempt in (("in two parts", _in_parts), ("static cache", _static)):
        try:
            output = attempt(root, batch, tokens.shape[1])
        except Exception as error:
            why = f"{name}: {type(error).__name__}"
            continue
        if output is None:
            continue
        largest = first[seen].abs().max().clamp(min=torch.finfo(first.dtype).tiny)
        change = (output.to(first.dtype)[seen] - first[seen]).abs().max() / largest
        found.append((float(change), name))
    if not found:
        return None, why
    worst = max(change for change, _ in found)
    return worst, f"tokens {' and '.join(name for _, name in found)}, against no cache"


def _in_parts(root: nn.Module, batch: Probe, length: int) -> Tensor | None:
    cut = length // 2
    head = {name: value[:, :cut] for name, value in batch.inputs.items()}
    result = run(root, head, use_cache=True)
    cache = cache_of(result)
    one = per_token(result, cut)
    if cache is None or one is None:
        return None
    tail = {
        name: value if name == "attention_mask" else value[:, cut:]
        for name, value in batch.inputs.items()
    }
    given = with_cache(root, cache)
    other = per_token(run(root, tail, use_cache=True, **given), length - cut)
    return None if other is None else torch.cat([one, other], dim=1)


def _static(root: nn.Module, batch: Probe, length: int) -> Tensor | None:
    from transformers import StaticCache

    config: Any = root.config
    cache = StaticCache(config=config, max_cache_len=length + SPARE)
    given = with_cache(root, cache)
    return per_token(run(root, batch.inputs, use_cache=True, **given), length)


def packed_difference(root: nn.Module, batch: Probe) -> float | None:
    """Largest difference of a document behind another one in a row from the same one alone.

    Documents are told apart by positions that start again. None if the model takes none.
    """
    accepts = parameters(root)
    tokens = batch.inputs.get("input_ids")
    if tokens is None or batch.changed != "input_ids" or "position_ids" not in accepts:
        return None
    if set(batch.inputs) - {"input_ids", "attention_mask", "position_ids"}:
        return None
    row, length = tokens[:1], tokens.shape[1]
    cut = length // 2
    places = torch.arange(length, device=row.device)[None]
    positions = torch.cat([places[:, :cut], places[:, : length - cut]], dim=1)
    try:
        packed = per_token(run(root, {"input_ids": row, "position_ids": positions}), length)
        alone = {"input_ids": row[:, cut:], "position_ids": positions[:, cut:]}
        single = per_token(run(root, alone), length - cut)
    except Exception:
        return None
    if packed is None or single is None:
        return None
    largest = single.abs().max().clamp(min=torch.finfo(single.dtype).tiny)
    return float((packed[:, cut:] - single).abs().max() / largest)
