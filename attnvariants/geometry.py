"""Which keys a query row can see: lengths, causality, a sliding window, and masks on top."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnvariants.context import readable, unguarded

# Rows of a mask that are counted at a time.
_COUNT_ROWS = 256


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
        """Whether nothing but the lengths limits what a row sees."""
        return self.left is None and self.right is None

    @property
    def sees_all(self) -> bool:
        """Whether every row sees every key, be it that there is one row and it is the last."""
        if self.unlimited or self.q_len != 1:
            return self.unlimited
        seen = self.columns(0, 1)
        return seen.start == 0 and seen.stop == self.kv_len

    @property
    def any_blind(self) -> bool:
        """Whether some row sees no key."""
        # what rows see grows, stays and shrinks along them: the first and the last see least
        ends = self.columns(0, 1), self.columns(self.q_len - 1, self.q_len)
        return self.q_len > 0 and any(end.start == end.stop for end in ends)

    def columns(self, start: int, stop: int) -> slice:
        """The keys that at least one of the rows `start .. stop` can see."""
        low = 0 if self.left is None else start + self.offset - self.left
        high = self.kv_len if self.right is None else stop + self.offset + self.right
        low = min(max(low, 0), self.kv_len)
        return slice(low, max(low, min(high, self.kv_len)))

    def counts(self, device: torch.device) -> Tensor:
        """Number of visible keys of each row, `[q_len]`, int64."""
        low, high = self._ends(device)
        return high - low

    def seen(self, keep: Tensor | None, device: torch.device) -> Tensor:
        """Number of keys each row sees through `keep` too, `[batch or 1, heads or 1, q_len]`."""
        if keep is None:
            return self.counts(device).view(1, 1, -1)
        everything = slice(0, self.kv_len)
        if unguarded():
            return (keep & self.keep(slice(0, self.q_len), everything, device)).sum(-1)
        if keep.shape[3] == 1:
            return keep[..., 0] * self.counts(device)
        if keep.shape[2] == 1:
            low, high = self._ends(device)
            before = torch.nn.functional.pad(keep[:, :, 0].cumsum(-1), (1, 0))
            return before[..., high] - before[..., low]
        if not readable(keep):
            return (keep & self.keep(slice(0, self.q_len), everything, device)).sum(-1)
        counts = [keep.new_zeros(*keep.shape[:2], 0, dtype=torch.int64)]
        for start in range(0, self.q_len, _COUNT_ROWS):
            rows = slice(start, min(start + _COUNT_ROWS, self.q_len))
            cols = self.columns(rows.start, rows.stop)
            part = keep[:, :, rows, cols] & self.keep(rows, cols, device)
            counts.append(part.sum(-1))
        return torch.cat(counts, -1)

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.q_len, device=device) + self.offset
        return _ends(position, self.kv_len, self.left, self.right)

    def distance(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Key position minus query position, `[rows, cols]`, int64."""
        position = torch.arange(rows.start, rows.stop, device=device) + self.offset
        return torch.arange(cols.start, cols.stop, device=device) - position.unsqueeze(-1)

    def keep(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """`[rows, cols]` bool: True where the row sees the key."""
        distance = self.distance(rows, cols, device)
        keep = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            keep = keep & (distance >= -self.left)
        if self.right is not None:
            keep = keep & (distance <= self.right)
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


@dataclass(frozen=True)
class Packed:
    """Sequences one after another in one row of tokens, each aligned bottom-right by itself.

    `cu_q` and `cu_k` are their boundaries, int32 `[sequences + 1]`; no sequence has more than
    `max_q` queries or `max_k` keys.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def positions(self, tokens_q: int, tokens_k: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of the queries and of the keys: where each token stands in its sequence, and the greater
        of the sequence's two lengths (at least 1), all int64 `[tokens]`.
        """
        starts, lengths = self._sequences()
        longest = torch.maximum(*lengths).clamp(min=1)
        spans = []
        for cu, tokens, start, shift in (
            (self.cu_q, tokens_q, starts[0], lengths[1] - lengths[0]),
            (self.cu_k, tokens_k, starts[1], torch.zeros_like(longest)),
        ):
            token, owner = _owners(cu, tokens)
            spans.append((token + (shift - start)[owner], longest[owner]))
        return tuple(spans)

    def counts(self, tokens_q: int, left: int | None, right: int | None) -> Tensor:
        """Number of visible keys of each query, `[tokens_q]`, int64."""
        starts, lengths = self._sequences()
        token, owner = _owners(self.cu_q, tokens_q)
        position = token + (lengths[1] - lengths[0] - starts[0])[owner]
        low, high = _ends(position, lengths[1][owner], left, right)
        return high - low

    def _sequences(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Starts and lengths of the sequences, of queries and of keys."""
        q, k = self.cu_q.long(), self.cu_k.long()
        return (q[:-1], k[:-1]), (q.diff(), k.diff())


def _ends(
    position: Tensor, kv_len: Any, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """First visible key of each position and the one after its last; `kv_len` may be a tensor."""
    low, high = torch.zeros_like(position), torch.zeros_like(position) + kv_len
    if left is not None:
        low = (position - left).clamp(min=0).clamp(max=kv_len)
    if right is not None:
        high = (position + right + 1).clamp(min=0).clamp(max=kv_len)
    return low, torch.maximum(low, high)


def _owners(cu: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Every token's index, and the sequence it belongs to."""
    token = torch.arange(tokens, device=cu.device)
    return token, torch.searchsorted(cu.long(), token, right=True) - 1
