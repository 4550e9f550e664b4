"""Which key positions a query row can see, from lengths, causality and a sliding window alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Row i stands at position `i + offset` and sees keys `position - left .. position + right`.

    `left` and `right` are None where unlimited. `offset = kv_len - q_len` is the bottom-right
    alignment of flash-attn; 0 is the upper-left one of PyTorch's `is_causal`.
    """

    q_len: int
    kv_len: int
    offset: int
    left: int | None = None
    right: int | None = None

    @property
    def unlimited(self) -> bool:
        """Whether every row sees every key."""
        return self.left is None and self.right is None

    def columns(self, start: int, stop: int) -> slice:
        """The keys that at least one of the rows `start .. stop` can see."""
        low = 0 if self.left is None else start + self.offset - self.left
        high = self.kv_len if self.right is None else stop + self.offset + self.right
        low = min(max(low, 0), self.kv_len)
        return slice(low, max(low, min(high, self.kv_len)))

    def counts(self, device: torch.device) -> Tensor:
        """Number of visible keys of each row, `[q_len]`, int64."""
        position = torch.arange(self.q_len, device=device) + self.offset
        low = torch.zeros_like(position)
        high = torch.full_like(position, self.kv_len)
        if self.left is not None:
            low = (position - self.left).clamp(0, self.kv_len)
        if self.right is not None:
            high = (position + self.right + 1).clamp(0, self.kv_len)
        return (high - low).clamp(min=0)

    def distance(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Key position minus query position, `[rows, cols]`, int64."""
        position = torch.arange(rows.start, rows.stop, device=device) + self.offset
        return torch.arange(cols.start, cols.stop, device=device) - position.unsqueeze(-1)

    def keep(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """`[rows, cols]` bool: True where the row sees the key."""
        distance = self.distance(rows, cols, device)
        keep = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            keep &= distance >= -self.left
        if self.right is not None:
            keep &= distance <= self.right
        return keep

    def edges(self, rows: slice, cols: slice) -> list[slice]:
        """The parts of `cols` that some, but perhaps not all, of these rows see."""
        first, last = rows.start + self.offset, rows.stop - 1 + self.offset
        left_end = cols.start if self.left is None else min(last - self.left, cols.stop)
        right_start = cols.stop if self.right is None else max(first + self.right + 1, cols.start)
        if right_start <= left_end:
            return [cols] if cols.stop > cols.start else []
        parts = slice(cols.start, left_end), slice(right_start, cols.stop)
        return [part for part in parts if part.stop > part.start]
