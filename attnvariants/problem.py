"""One validated attention call, as the engines see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants.dropout import Dropout
from attnvariants.geometry import Geometry
from attnvariants.registry import Rows, Variant


class RowStats(NamedTuple):
    """Statistics of each row of weights, `[batch, heads, q_len]`, without a gradient.

    Attributes:
        visible: n, the number of keys the row sees (int64).
        mass: the sum of its weights.
        largest: its largest weight; 0 for a row that sees nothing.
        lse: log sum exp of its scores; -inf for a row that sees nothing.
    """

    visible: Tensor
    mass: Tensor
    largest: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Problem:
    """Query and key after the variant's `prepare`, and all that turns their product into weights.

    `keep` and `bias` are 4-D with sizes that broadcast to [batch, heads, q_len, kv_len]; `slopes`
    is [batch or 1, heads]; `visible` is [batch or 1, heads or 1, q_len], int64; `any_blind` says
    whether it holds a 0. Learned options are tensors of shape [heads, 1, 1] or [1, 1, 1].
    """

    variant: Variant
    options: Mapping[str, Any]
    geometry: Geometry
    scale: float
    softcap: float
    visible: Tensor
    keep: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    dropout: Dropout | None = None
    any_blind: bool = False
    edges: dict[tuple[int, ...], Tensor] = field(default_factory=dict, compare=False)

    def hidden_edge(self, rows: slice, cols: slice, device: torch.device) -> Tensor:
        """Which of these keys these rows do not see by geometry alone, bool `[rows, cols]`.

        Remembered in `edges`: a few small masks serve all blocks of a call.
        """
        place = rows.stop - rows.start, cols.stop - cols.start, rows.start - cols.start
        if place not in self.edges:
            self.edges[place] = ~self.geometry.keep(rows, cols, device)
        return self.edges[place]

    @property
    def hidden(self) -> float:
        """The score of a key that is not there."""
        return self.variant.hidden_score(self.options)

    @property
    def learned(self) -> dict[str, Tensor]:
        """The options given as tensors."""
        return {name: value for name, value in self.options.items() if isinstance(value, Tensor)}

    def rows(self, batch: slice, heads: slice, rows: slice, dtype: torch.dtype) -> Rows:
        """What the variant may know about these rows."""
        visible = pick(pick(self.visible, 0, batch), 1, heads)[..., rows]
        geometry = self.geometry
        return Rows(
            visible.to(dtype).unsqueeze(-1), geometry.q_len, geometry.kv_len, geometry.offset
        )


def pick(tensor: Tensor, dim: int, part: slice) -> Tensor:
    """`tensor` narrowed to `part` along `dim`, unless it broadcasts there."""
    if tensor.shape[dim] == 1:
        return tensor
    return tensor.narrow(dim, part.start, part.stop - part.start)


def block_of(tensor: Tensor, batch: slice, heads: slice, rows: slice, cols: slice) -> Tensor:
    """The block of a tensor that broadcasts to [batch, heads, q_len, kv_len]."""
    for dim, part in enumerate((batch, heads, rows, cols)):
        tensor = pick(tensor, dim, part)
    return tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
