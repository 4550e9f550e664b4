"""Figures of attention weights, per head, read block by block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnvariants.api import attention, iter_weights
from attnvariants.checks import dense
from attnvariants.chunked import WeightBlock
from attnvariants.diagnostics.definitions import DEAD_OUTPUT, DEAD_ROW, DEAD_SHARE
from attnvariants.registry import Variant
from attnvariants.scalars import in_words, is_real, plain


@dataclass(frozen=True)
class AttentionMetrics:
    """Figures of one attention layer, each `[heads]`, float64, on the CPU, never NaN.

    `DEFINITIONS` defines them. Token 0 is the first key that any of the counted queries sees, so
    padding on the left does not hide it. A figure over nothing (say, without query 0 in sequences
    of one token) is 0. `dead_tokens` and `dead_head` are None where no output was given.
    """

    sink_rate: Tensor
    sink_rate_without_query_0: Tensor
    sink_rate_proportional: Tensor
    sink_share: Tensor
    sink_weight: Tensor
    row_mass: Tensor
    dead_rows: Tensor
    entropy: Tensor
    sparsity: Tensor
    dead_tokens: Tensor | None = None
    dead_head: Tensor | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.sink_rate.numel()

    def figures(self) -> dict[str, Tensor]:
        """Name to `[heads]`, without the figures that were not measured."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


class AttentionSums:
    """Sums over batches of one layer's attention, from which `metrics` makes its figures."""

    def __init__(self, sink_threshold: float = 0.3):
        self.sink_threshold = check_threshold(sink_threshold)
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        blocks: Iterable[WeightBlock],
        shape: Sequence[int],
        *,
        query_mask: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            blocks: from `iter_weights`; every row in one block.
            shape: batch, heads and q_len of the call.
            query_mask: `[batch, q_len]` bool, True for queries that count; default all.
            out: `[batch, heads, q_len, value_dim]`, the heads' outputs, for dead heads.

        Raises:
            ValueError: `query_mask` or `out` has another shape, heads differ between batches, or
                a weight is not finite.
        """
        batch, heads, q_len = shape
        if query_mask is not None and (
            dense("query_mask", query_mask).dtype != torch.bool
            or tuple(query_mask.shape) != (batch, q_len)
        ):
            raise ValueError(
                f"query_mask must be bool with shape [batch, q_len] = {[batch, q_len]}, "
                f"got {query_mask.dtype} with {list(query_mask.shape)}."
            )
        if out is not None and tuple(dense("out", out).shape[:3]) != (batch, heads, q_len):
            raise ValueError(
                f"out must have shape {[batch, heads, q_len]} + [value_dim], got {list(out.shape)}."
            )
        if self._sums and self._sums["samples"].numel() != heads:
            raise ValueError(
                f"every batch must have {self._sums['samples'].numel()} heads, got {heads}."
            )
        rows = _read(blocks, shape)
        counted = rows["visible"] > 0
        if query_mask is not None:
            counted &= query_mask.cpu()[:, None, :]
        for name, value in _sums(rows, counted, self.sink_threshold).items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        if out is not None:
            silent = (out.detach().abs().amax(-1) < DEAD_OUTPUT).cpu() & counted
            for name, value in (("silent", silent), ("outputs", counted)):
                self._sums[name] = self._sums.get(name, 0.0) + _over_rows(value).double()

    def metrics(self) -> AttentionMetrics:
        """The figures of all batches added.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sums:
            raise ValueError("AttentionSums holds no batch; call add first.")
        s = self._sums
        dead_tokens = _over(s["silent"], s["outputs"]) if "silent" in s else None
        dead_head = None
        if dead_tokens is not None:
            dead_head = ((dead_tokens >= DEAD_SHARE) & (s["outputs"] > 0)).double()
        return AttentionMetrics(
            sink_rate=_over(s["sinks"], s["samples"]),
            sink_rate_without_query_0=_over(s["choosing_sinks"], s["choosing_samples"]),
            sink_rate_proportional=_over(s["proportional_sinks"], s["samples"]),
            sink_share=_over(s["sink_mass"], s["choosing_mass"]),
            sink_weight=_over(s["sink_weight"], s["samples"]),
            row_mass=_over(s["mass"], s["rows"]),
            dead_rows=_over(s["dead"], s["rows"]),
            entropy=_over(s["entropy"], s["live"]),
            sparsity=_over(s["zeros"], s["visible"]),
            dead_tokens=dead_tokens,
            dead_head=dead_head,
        )


def attention_metrics(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    variant: str | Variant = "softmax",
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    query_mask: Tensor | None = None,
    sink_threshold: float = 0.3,
    **options: Any,
) -> AttentionMetrics:
    """Figures of the weights of one attention call, per head.

    Args:
        query, key, value, variant, ...: as `attention`'s; a value is needed for the figures of
            dead heads alone.
        query_mask: `[batch, q_len]` bool, True for queries that count (leave padding out).
        sink_threshold: weight on token 0 beyond which a sequence has a sink.

    Raises:
        ValueError: as `attention`; or `query_mask` or `sink_threshold` is out of the contract.
    """
    call = dict(
        attn_mask=attn_mask,
        bias=bias,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        **options,
    )
    sums = AttentionSums(sink_threshold)
    blocks = iter_weights(query, key, variant, **call)
    out = None
    if value is not None:
        with torch.no_grad():
            out = attention(query, key, value, variant, **call)
    sums.add(blocks, query.shape[:3], query_mask=query_mask, out=out)
    return sums.metrics()


def check_threshold(sink_threshold: float) -> float:
    """`sink_threshold` if it is a number between 0 and 1."""
    number = plain("sink_threshold", sink_threshold)
    if not is_real(number) or not 0 < number < 1:
        raise ValueError(
            f"sink_threshold must be a number between 0 and 1, got {in_words(sink_threshold)}."
        )
    return float(number)


def _read(blocks: Iterable[WeightBlock], shape: Sequence[int]) -> dict[str, Tensor]:
    """Figures of each row, `[batch, heads, q_len]` on the CPU; 0 for rows of no block."""
    names = ("visible", "first", "at_first", "mass", "size", "entropy", "zeros")
    rows = torch.zeros(len(names), *shape, dtype=torch.float64)
    for block in blocks:
        weights = block.weights
        keep = block.keep.expand(weights.shape)
        first = keep.byte().argmax(-1)
        absolute = weights.abs()
        size = absolute.sum(-1)
        tiny = torch.finfo(weights.dtype).tiny
        share = absolute.div_(size.clamp(min=tiny).unsqueeze(-1))
        read = (
            keep.sum(-1),
            first + block.cols.start,
            weights.gather(-1, first.unsqueeze(-1)).squeeze(-1),
            weights.sum(-1),
            size,
            torch.special.entr(share).sum(-1),
            ((weights == 0) & keep).sum(-1),
        )
        part = torch.stack([figure.to(weights.dtype) for figure in read])
        rows[:, block.batch, block.heads, block.rows] = part.cpu().double()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("attention weights hold NaN or infinity; there is nothing to measure.")
    return dict(zip(names, rows, strict=True))


def _sums(rows: dict[str, Tensor], counted: Tensor, threshold: float) -> dict[str, Tensor]:
    """What one batch adds, each `[heads]`."""
    # The smallest of the rows' first keys is token 0, so a row sees it if its own first key is it.
    first = rows["first"].masked_fill(~counted, torch.inf)
    sees = counted & (first == first.amin(-1, keepdim=True))
    chooses = sees & (rows["visible"] > 1)
    live = counted & (rows["size"] >= DEAD_ROW)
    at_first, size = rows["at_first"], rows["size"]
    share = at_first.abs() / size.clamp(min=DEAD_ROW)

    weight, has = _row_mean(at_first, sees)
    choosing_weight, has_choice = _row_mean(at_first, chooses)
    proportion, _ = _row_mean(share, sees & live)
    return {
        "samples": has.sum(0),
        "sinks": ((weight > threshold) & has).sum(0),
        "sink_weight": weight.sum(0),
        "choosing_samples": has_choice.sum(0),
        "choosing_sinks": ((choosing_weight > threshold) & has_choice).sum(0),
        "proportional_sinks": ((proportion > threshold) & has).sum(0),
        "sink_mass": _over_rows(at_first.abs() * chooses),
        "choosing_mass": _over_rows(size * chooses),
        "rows": _over_rows(counted),
        "mass": _over_rows(rows["mass"] * counted),
        "dead": _over_rows(counted & ~live),
        "live": _over_rows(live),
        "entropy": _over_rows(rows["entropy"] * live),
        "zeros": _over_rows(rows["zeros"] * counted),
        "visible": _over_rows(rows["visible"] * counted),
    }


def _row_mean(figure: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the rows `where`, and whether there are any, each `[batch, heads]`."""
    count = where.sum(-1)
    return (figure * where).sum(-1) / count.clamp(min=1), count > 0


def _over_rows(figure: Tensor) -> Tensor:
    return figure.sum((0, 2))


def _over(total: Tensor, count: Tensor) -> Tensor:
    """`total / count`, 0 where there is nothing to count."""
    return torch.where(count > 0, total / count.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
