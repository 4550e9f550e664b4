"""Keys that lie in pages, or of which only some are used, as one row of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnvariants import checks
from attnvariants.context import readable


def used_keys(
    key: Tensor,
    value: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that count, one sequence after another, and their boundaries.

    Args:
        key: `[tokens_k, kv_heads, head_dim]`, or with a block table `[pages, page_size, ...]`.
        value: likewise.
        cu_seqlens_k: boundaries of the sequences; None where `block_table` and `seqused_k` say all.
        block_table: int `[sequences, blocks]`, the pages of each sequence in order.
        seqused_k: int `[sequences]`, how many keys from each sequence's start count.
        leftpad_k: int `[sequences]`, how many of these to leave out at the start.

    Raises:
        ValueError: one of them is out of this contract, or a page is not in the pools.
    """
    pool = None if block_table is None else _pool(key, value)
    for name, tensor in (("k", key), ("v", value)):
        if checks.dense(name, tensor).dim() < 3:
            raise ValueError(f"{name} must be {checks.PACKED.axes}, got {list(tensor.shape)}.")
    device = key.device
    starts, lengths = _spans(key, cu_seqlens_k, seqused_k, paged=pool is not None)
    skipped = torch.zeros_like(lengths)
    if leftpad_k is not None:
        skipped = _integers("leftpad_k", leftpad_k, lengths.shape[0], device)
        if bool((skipped > lengths).any()):
            raise ValueError(
                f"leftpad_k must not exceed the numbers of keys {lengths.tolist()}, "
                f"got {skipped.tolist()}."
            )
        lengths = lengths - skipped
    ends = lengths.cumsum(0)
    owner = torch.arange(lengths.shape[0], device=device).repeat_interleave(lengths)
    place = torch.arange(owner.shape[0], device=device) + (skipped - ends + lengths)[owner]
    if pool is None:
        rows = place + starts[owner]
    else:
        rows = _rows_of(place, owner, block_table, lengths.shape[0], *pool)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    boundaries = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return key.index_select(0, rows), value.index_select(0, rows), boundaries


def _spans(key: Tensor, cu_seqlens_k: Any, seqused_k: Any, paged: bool) -> tuple[Tensor, Tensor]:
    """Where each sequence starts, which means nothing in pages, and how many keys it has."""
    if cu_seqlens_k is None and paged and seqused_k is not None:
        lengths = _integers("seqused_k", seqused_k, None, key.device)
        return torch.zeros_like(lengths), lengths
    if cu_seqlens_k is None:
        raise ValueError(
            "cu_seqlens_k must be a tensor [sequences + 1], got None; it can be left out only with "
            "block_table and seqused_k."
        )
    _need_values("cu_seqlens_k", cu_seqlens_k)
    tokens = None if paged else key.shape[0]
    checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, tokens, "key")
    bounds = cu_seqlens_k.to(key.device, torch.int64)
    starts, lengths = bounds[:-1], bounds.diff()
    if seqused_k is None:
        return starts, lengths
    used = _integers("seqused_k", seqused_k, lengths.shape[0], key.device)
    if not paged and bool((used > lengths).any()):
        raise ValueError(
            f"seqused_k must not exceed the sequences' lengths {lengths.tolist()} by "
            f"cu_seqlens_k, got {used.tolist()}."
        )
    return starts, used


def _rows_of(
    place: Tensor, owner: Tensor, block_table: Any, sequences: int, pages: int, size: int
) -> Tensor:
    """The row of the flattened pool that holds each key, given its place in its sequence."""
    table = _integers("block_table", block_table, sequences, place.device, dim=2, low=None)
    block = place // size
    if place.numel() and int(block.max()) >= table.shape[1]:
        raise ValueError(
            f"block_table has {table.shape[1]} pages of {size} keys a sequence, but a sequence has "
            f"{int(place.max()) + 1} keys; give it more pages, or smaller lengths."
        )
    page = table[owner, block]
    outside = (page < 0) | (page >= pages)
    if bool(outside.any()):
        raise ValueError(
            f"block_table must name pages 0 .. {pages - 1} of the pools k and v, "
            f"got {int(page[outside][0])} for a key in use."
        )
    return page * size + place % size


def _pool(key: Any, value: Any) -> tuple[int, int]:
    """Number and size of the pages."""
    for name, pool in (("k", key), ("v", value)):
        if checks.dense(name, pool).dim() != 4 or not pool.shape[1]:
            raise ValueError(
                f"{name} must be a pool [pages, page_size, heads, head_dim] with block_table, "
                f"got shape {list(pool.shape)}."
            )
    if key.shape[:2] != value.shape[:2] or key.device != value.device:
        raise ValueError(
            "k and v must be pools of as many pages of one size on one device with block_table, "
            f"got {list(key.shape)} on {key.device} and {list(value.shape)} on {value.device}."
        )
    return key.shape[0], key.shape[1]


def _integers(
    name: str,
    tensor: Any,
    sequences: int | None,
    device: torch.device,
    dim: int = 1,
    low: int | None = 0,
) -> Tensor:
    """An integer tensor with a row a sequence, as int64."""
    shape = "[sequences, blocks]" if dim == 2 else "[sequences]"
    if checks.dense(name, tensor).dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be an int32 or int64 tensor {shape}, got {tensor.dtype}; convert it."
        )
    several = "" if sequences is None else f" for {sequences} sequences"
    if tensor.dim() != dim or (sequences is not None and tensor.shape[0] != sequences):
        raise ValueError(f"{name} must have shape {shape}{several}, got {list(tensor.shape)}.")
    if tensor.device != device:
        raise ValueError(f"{name} must be on k's device {device}, got {tensor.device}; move it.")
    _need_values(name, tensor)
    if low is not None and bool((tensor < low).any()):
        raise ValueError(f"{name} must not be negative, got {tensor.tolist()}.")
    return tensor.long()


def _need_values(name: str, tensor: Any) -> None:
    known = torch.compiler.is_compiling() or not isinstance(tensor, Tensor)
    if not known and not readable(tensor):
        raise ValueError(
            f"{name} must have values that can be read, got a tensor on the meta device, a fake "
            "one, or one that is traced or mapped by vmap; gather the keys before the call."
        )
