"""How the chunked engine cuts a call into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnvariants.geometry import Geometry
from attnvariants.problem import Problem

# Two of 64 rows x 4,096 keys a thread measured fastest, with 1 MiB of L2 cache a core.
_THREAD_SCORES = 1 << 19
_BLOCK_ROWS = 64


@dataclass(frozen=True)
class Block:
    """Where a block lies; group and ungroup fold query heads that share a key head into rows."""

    batch: slice
    kv_heads: slice
    heads: slice
    rows: slice
    cols: slice

    @property
    def where(self) -> tuple[slice, slice, slice, slice]:
        """Its place in [batch, heads, q_len, kv_len]."""
        return self.batch, self.heads, self.rows, self.cols

    @property
    def height(self) -> int:
        """Its number of rows."""
        return self.rows.stop - self.rows.start

    def queries(self, tensor: Tensor) -> Tensor:
        """Its part of [batch, heads, q_len, width]."""
        return tensor[self.batch, self.heads, self.rows]

    def keys(self, tensor: Tensor) -> Tensor:
        """Its part of [batch, kv_heads, kv_len, width]."""
        return tensor[self.batch, self.kv_heads, self.cols]

    def group(self, tensor: Tensor) -> Tensor:
        """[batch, heads, rows, width] to [batch, kv_heads, group * rows, width]."""
        kv_heads = self.kv_heads.stop - self.kv_heads.start
        rows = tensor.shape[1] * tensor.shape[2] // kv_heads
        return tensor.reshape(tensor.shape[0], kv_heads, rows, tensor.shape[-1])

    def ungroup(self, tensor: Tensor) -> Tensor:
        """[batch, kv_heads, group * rows, width] back to [batch, heads, rows, width]."""
        heads = self.heads.stop - self.heads.start
        return tensor.view(tensor.shape[0], heads, self.height, tensor.shape[-1])


def blocks(batch: int, kv_heads: int, group: int, problem: Problem) -> Iterator[Block]:
    """Blocks that cover every row that sees a key; rows of no block see none."""
    geometry = problem.geometry
    if not batch * geometry.q_len * geometry.kv_len:
        return
    height = min(geometry.q_len, max(16, _BLOCK_ROWS // group))
    size = group * height * geometry.kv_len
    budget = _THREAD_SCORES * torch.get_num_threads()
    heads = min(kv_heads, max(1, budget // size))
    batches = min(batch, max(1, budget // (size * kv_heads))) if heads == kv_heads else 1
    for b in range(0, batch, batches):
        for h in range(0, kv_heads, heads):
            h_stop = min(h + heads, kv_heads)
            # the last rows see the most keys: going down, freed memory fits the next block
            r_stop = geometry.q_len
            while r_stop:
                r = max(0, r_stop - _taller(height, r_stop, geometry))
                cols = geometry.columns(r, r_stop)
                if cols.start < cols.stop:
                    yield Block(
                        slice(b, min(b + batches, batch)),
                        slice(h, h_stop),
                        slice(h * group, h_stop * group),
                        slice(r, r_stop),
                        cols,
                    )
                r_stop = r


def _taller(height: int, r_stop: int, geometry: Geometry) -> int:
    """`height`, twice or four times it where the row before `r_stop` sees few of the keys.

    No more than a quarter of what it sees, so that little is computed beyond the diagonal, and no
    more scores than `height` full rows have.
    """
    cols = geometry.columns(r_stop - 1, r_stop)
    seen = max(1, cols.stop - cols.start)
    for times in (4, 2):
        if times * seen <= geometry.kv_len and times * height <= seen // 4:
            return times * height
    return height
