"""Validation of a call: one sentence a fault, saying what was expected, what came and the fix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.utils.weak import WeakIdKeyDictionary

from attnvariants.context import batched, readable

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Layout:
    """How query, key and value come to a function, and what it calls them."""

    names: tuple[str, str, str]
    axes: str
    head: int
    token: int
    swapped: str

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.axes.count(",") + 1


_NAMES = ("query", "key", "value"), ("q", "k", "v")
ATTENTION = Layout(
    _NAMES[0],
    "[batch, heads, tokens, head_dim]",
    head=1,
    token=2,
    swapped="flash-attn's [batch, tokens, heads, head_dim]: pass each with .transpose(1, 2), or "
    "call flash_attn_func",
)
PACKED = Layout(
    _NAMES[0],
    "[tokens, heads, head_dim]",
    head=1,
    token=0,
    swapped="[heads, tokens, head_dim]: pass each with .transpose(0, 1)",
)
FLASH = Layout(
    _NAMES[1],
    "[batch, tokens, heads, head_dim]",
    head=2,
    token=1,
    swapped="[batch, heads, tokens, head_dim]: pass each with .transpose(1, 2), or call attention",
)
FLASH_PACKED = replace(PACKED, names=_NAMES[1])


def dense(name: str, tensor: Any) -> Tensor:
    """`tensor` if it is one that every engine can read.

    Raises:
        ValueError: it is no tensor, or a sparse, nested, quantized or masked one.
    """
    if not isinstance(tensor, Tensor):
        array = hasattr(tensor, "__array__") or isinstance(tensor, (list, tuple))
        hint = "; convert it with torch.as_tensor" if array else ""
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}.")
    if isinstance(tensor, MaskedTensor):
        raise ValueError(
            f"{name} must be a plain tensor, got a MaskedTensor; pass its get_data(), and its "
            "get_mask() as attn_mask."
        )
    # by its name, because importing it would import all of torch.distributed
    if type(tensor).__name__ == "DTensor":
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor; pass its to_local(), with batch or "
            "heads sharded and tokens whole."
        )
    if tensor.is_nested:
        raise ValueError(
            f"{name} must be a plain tensor, got a nested one; pack its sequences one after "
            "another and call attention_varlen with their boundaries."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {tensor.layout}; pass {name}.to_dense().")
    if tensor.is_quantized:
        raise ValueError(
            f"{name} must not be quantized, got {tensor.dtype}; pass {name}.dequantize()."
        )
    return tensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless its dtype is one that is computed with."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be floating point of 16, 32 or 64 bits, got {tensor.dtype}; convert it."
        )


def check_qkv(query: Tensor, key: Tensor, value: Tensor, layout: Layout = ATTENTION) -> None:
    """Ranks, dtypes, devices, and sizes that must agree."""
    q, k, v = layout.names
    named = {q: query, k: key, v: value}
    for name, tensor in named.items():
        dense(name, tensor)
        if tensor.dim() != layout.rank:
            raise ValueError(
                f"{name} must have {layout.rank} dimensions, {layout.axes}, "
                f"got shape {list(tensor.shape)}."
            )
        check_floating(name, tensor)
    for name in (k, v):
        if named[name].dtype != query.dtype:
            raise ValueError(
                f"{name} must have {q}'s dtype {query.dtype}, got {named[name].dtype}; "
                "convert one of them."
            )
        if named[name].device != query.device:
            raise ValueError(
                f"{name} must be on {q}'s device {query.device}, got {named[name].device}; "
                "move one of them."
            )
    head, token = layout.head, layout.token
    if layout.rank == 4 and not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"{q}, {k} and {v} must have one batch size, "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}."
        )
    if key.shape[head] != value.shape[head]:
        raise ValueError(
            f"{k} and {v} must have as many heads, got {key.shape[head]} and {value.shape[head]}."
        )
    if key.shape[token] != value.shape[token]:
        raise ValueError(
            f"{k} and {v} must have as many tokens, "
            f"got {key.shape[token]} and {value.shape[token]}."
        )
    if key.shape[-1] != query.shape[-1] or not query.shape[-1]:
        raise ValueError(
            f"{q} and {k} must have one head_dim, at least 1, "
            f"got {query.shape[-1]} and {key.shape[-1]}."
        )
    if not _groups(query.shape[head], key.shape[head]):
        swapped = _groups(query.shape[token], key.shape[token])
        raise ValueError(
            f"{k} has {key.shape[head]} heads and {q} has {query.shape[head]}; the number of "
            f"query heads must be a positive multiple of the number of key heads in {layout.axes}."
            f"{f' They may be {layout.swapped}.' if swapped else ''}"
        )


def _groups(heads: int, kv_heads: int) -> bool:
    """Whether so many query heads can share so many key heads."""
    # not bool(heads), which torch 2.6 cannot trace
    return heads > 0 and kv_heads > 0 and heads % kv_heads == 0


def broadcastable(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`tensor` as 4-D, its sizes those of `shape` or 1."""
    dense(name, tensor)
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on query's device {device}, got {tensor.device}; move it."
        )
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != 4 or any(s not in (1, full) for s, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to [batch, heads, q_len, kv_len] = {list(shape)}, "
            f"got shape {list(tensor.shape)}.{_mask_hint(name, tuple(tensor.shape), shape)}"
        )
    return tensor.view(sizes)


def _mask_hint(name: str, got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What a mask of another shape may have been meant as, and how to pass that."""
    batch, heads, q_len, kv_len = shape
    if got == (batch, kv_len):
        return f" A key-padding mask [batch, kv_len] goes in as {_view(name)}[:, None, None, :]."
    if len(got) == 3 and got[0] == batch and got[1] in (1, q_len) and got[2] in (1, kv_len):
        return f" A mask [batch, q_len, kv_len] goes in as {_view(name)}[:, None]."
    if got == (batch * heads, q_len, kv_len):
        return (
            f" A mask [batch * heads, q_len, kv_len] goes in as "
            f"{name}.unflatten(0, ({batch}, {heads}))."
        )
    if got[-2:] == (kv_len, q_len) and q_len != kv_len:
        return f" The last two sizes are [q_len, kv_len]: if they are swapped, pass {name}.mT."
    if got[-2:] == (heads, heads) and q_len != heads:
        return (
            " If query is flash-attn's [batch, tokens, heads, head_dim], pass query, key and value "
            "with .transpose(1, 2)."
        )
    if len(got) <= 4 and got[-1] > kv_len:
        return f" There are {kv_len} keys: if those behind them are empty, cut {name} to them."
    return ""


def _view(name: str) -> str:
    return "mask" if name == "attn_mask" else name


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
    check_floating("alibi_slopes", dense("alibi_slopes", slopes))
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


def check_cu_seqlens(name: str, cu_seqlens: Any, tokens: int | None, of: str) -> list[int] | None:
    """The boundaries of packed sequences as integers; None where they cannot be read.

    They end at `tokens`, or anywhere if that is None.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(
            f"{name} must be an int32 or int64 tensor [sequences + 1], got {got}; convert it."
        )
    if dense(name, cu_seqlens).dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"{name} must have shape [sequences + 1], got {list(cu_seqlens.shape)}.")
    if not torch.compiler.is_compiling() and batched(cu_seqlens):
        raise ValueError(
            f"{name} must be the same for all that vmap maps, got a mapped tensor; pack the mapped "
            "sequences too."
        )
    if not readable(cu_seqlens):
        return None
    bounds = _bounds(cu_seqlens)
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}.")
    if any(later < earlier for earlier, later in pairwise(bounds)):
        raise ValueError(f"{name} must not decrease, got {bounds}.")
    if tokens is not None and bounds[-1] != tokens:
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
