"""Validation of a call: one sentence a fault, saying what was expected, what came and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
_LAYOUTS = {4: "[batch, heads, tokens, head_dim]", 3: "[tokens, heads, head_dim]"}


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: not while compiling, on the meta device or in a vmap."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return not tensor.is_meta


def check_qkv(query: Tensor, key: Tensor, value: Tensor, rank: int = 4) -> None:
    """Ranks, dtypes, devices, and sizes that must agree, of `rank`-dimensional inputs."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
        if tensor.dim() != rank:
            raise ValueError(
                f"{name} must have {rank} dimensions, {_LAYOUTS[rank]}, "
                f"got shape {list(tensor.shape)}."
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be floating point of 16, 32 or 64 bits, got {tensor.dtype}; "
                "convert it."
            )
    for name in ("key", "value"):
        if named[name].dtype != query.dtype:
            raise ValueError(
                f"{name} must have query's dtype {query.dtype}, got {named[name].dtype}; "
                "convert one of them."
            )
        if named[name].device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {named[name].device}; "
                "move one of them."
            )
    head, token = (1, 2) if rank == 4 else (1, 0)
    if rank == 4 and not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            "query, key and value must have one batch size, "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}."
        )
    if key.shape[head] != value.shape[head]:
        raise ValueError(
            f"key and value must have as many heads, got {key.shape[head]} and {value.shape[head]}."
        )
    if key.shape[token] != value.shape[token]:
        raise ValueError(
            "key and value must have as many tokens, "
            f"got {key.shape[token]} and {value.shape[token]}."
        )
    if key.shape[-1] != query.shape[-1] or not query.shape[-1]:
        raise ValueError(
            "query and key must have one head_dim, at least 1, "
            f"got {query.shape[-1]} and {key.shape[-1]}."
        )
    heads, kv_heads = query.shape[head], key.shape[head]
    if not kv_heads or heads % kv_heads or not heads:
        raise ValueError(
            f"key has {kv_heads} heads and query has {heads}; the number of query heads must be a "
            "positive multiple of the number of key heads."
        )


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float within bounds."""
    if isinstance(value, Tensor) and value.numel() == 1:
        if value.requires_grad:
            raise ValueError(
                f"{name} must be a number, got a tensor that requires a gradient, which it would "
                "not get; multiply query by it instead."
            )
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # comparisons, which a symbolic number of a call being compiled has too
    if not number or not abs(value) < math.inf or not low <= value <= high:
        between = "" if low == -math.inf else f" >= {low:g}"
        between += "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be a finite number{between}, got {value!r}.")
    return float(value)


def check_window(window_size: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for unlimited."""
    if window_size is None:
        return None, None
    pair = isinstance(window_size, Sequence) and len(window_size) == 2
    if not pair or not all(isinstance(w, int) and not isinstance(w, bool) for w in window_size):
        raise ValueError(
            "window_size must be two integers (left, right), -1 for unlimited, "
            f"got {window_size!r}."
        )
    if min(window_size) < -1:
        raise ValueError(
            f"window_size must not be negative (but -1, for unlimited), got {tuple(window_size)}."
        )
    left, right = (None if size == -1 else size for size in window_size)
    return left, right


def check_position(position: Any, device: torch.device) -> None:
    """An integer >= 0, or an int64 scalar tensor."""
    if isinstance(position, Tensor):
        if position.dim() or position.dtype != torch.int64 or position.device != device:
            raise ValueError(
                f"position must be an integer or an int64 scalar on {device}, got shape "
                f"{list(position.shape)} of {position.dtype} on {position.device}."
            )
        return
    whole = isinstance(position, (int, torch.SymInt)) and not isinstance(position, bool)
    if not whole or position < 0:
        raise ValueError(f"position must be an integer >= 0 or an int64 scalar, got {position!r}.")


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def broadcastable(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`tensor` as 4-D, its sizes those of `shape` or 1."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on query's device {device}, got {tensor.device}; move it."
        )
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != 4 or any(s not in (1, full) for s, full in zip(sizes, shape, strict=True)):
        hint = ""
        if tensor.dim() == 2 and tuple(tensor.shape) == (shape[0], shape[3]):
            hint = " A key-padding mask [batch, kv_len] goes in as mask[:, None, None, :]."
        raise ValueError(
            f"{name} must broadcast to [batch, heads, q_len, kv_len] = {list(shape)}, "
            f"got shape {list(tensor.shape)}.{hint}"
        )
    return tensor.view(sizes)


def collapse(mask: Tensor) -> Tensor:
    """`mask` with the dimensions it was merely expanded along back at size 1."""
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def split_mask(tensor: Tensor) -> tuple[Tensor | None, Tensor]:
    """A float mask as (visibility or None, finite bias): -inf and the dtype's minimum hide."""
    # half of it, so that a minimum that was rounded or converted from bfloat16 still counts
    hidden = tensor <= torch.finfo(tensor.dtype).min / 2
    if readable(tensor) and not bool(hidden.any()):
        return None, tensor
    return ~hidden, tensor.masked_fill(hidden, 0.0)


def check_slopes(slopes: Any, batch: int, heads: int, device: torch.device) -> Tensor:
    """ALiBi slopes as [1 or batch, heads]."""
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        got = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
        raise ValueError(
            f"alibi_slopes must be a floating tensor [heads] or [batch, heads], got {got}."
        )
    if slopes.device != device:
        raise ValueError(
            f"alibi_slopes must be on query's device {device}, got {slopes.device}; move it."
        )
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape [{heads}] or [{batch}, {heads}], "
            f"got {list(slopes.shape)}."
        )
    values = slopes.device.type == "cpu" and readable(slopes)
    if values and not bool(torch.isfinite(slopes.detach()).all()):
        raise ValueError("alibi_slopes must be finite, got NaN or infinity.")
    return slopes.view(-1, heads)


# reading a boundary tensor waits for its device, and all layers of a model share one
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_cu_seqlens(name: str, cu_seqlens: Any, tokens: int, of: str) -> list[int] | None:
    """The boundaries of packed sequences as integers; None where they cannot be read."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(
            f"{name} must be an int32 or int64 tensor [sequences + 1], got {got}; convert it."
        )
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"{name} must have shape [sequences + 1], got {list(cu_seqlens.shape)}.")
    if not readable(cu_seqlens):
        return None
    bounds = _bounds(cu_seqlens)
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}.")
    if any(later < earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"{name} must not decrease, got {bounds}.")
    if bounds[-1] != tokens:
        raise ValueError(
            f"{name} must end at the number of {of} tokens, {tokens}, got {bounds[-1]}."
        )
    return bounds


def _bounds(cu_seqlens: Tensor) -> list[int]:
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return cu_seqlens.tolist()
    version, bounds = _read.get(cu_seqlens, (None, []))
    if version != cu_seqlens._version:
        bounds = cu_seqlens.tolist()
        _read[cu_seqlens] = cu_seqlens._version, bounds
    return bounds
