"""The reference engine: dense, plain, differentiable torch. The oracle of every other engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnvariants.problem import Problem, RowStats, compute_dtype
from attnvariants.registry import Rows, Variant


def weights(query: Tensor, key: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scores and visibility of a call, each `[batch, heads, q_len, kv_len]`."""
    geometry = problem.geometry
    rows = problem.all_rows(query.dtype)
    everything = slice(0, geometry.q_len), slice(0, geometry.kv_len)
    return weights_of(query, key, problem, rows, *everything)


def weights_of(
    query: Tensor, key: Tensor, problem: Problem, rows: Rows, where: slice, cols: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """As `weights`, of a block; differentiable, like it.

    Args:
        query: `[batch, heads, rows, head_dim]`, the block's.
        key: `[batch, kv_heads, keys, head_dim]`, the block's.
        problem: the call, its mask, bias, slopes and learned options those of the block.
        rows: what the variant may know about the block's rows.
        where: the block's rows in the call.
        cols: its keys.
    """
    geometry = problem.geometry
    grouped = query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1]))
    scores = problem.scale * (grouped @ key.unsqueeze(2).transpose(-1, -2)).flatten(1, 2)
    if problem.softcap:
        scores = problem.softcap * _tanh(scores / problem.softcap)
    if problem.slopes is not None:
        distance = geometry.distance(where, cols, query.device).abs()
        scores = scores - problem.slopes[..., None, None] * distance
    if problem.bias is not None:
        scores = scores + problem.bias
    keep = geometry.keep(where, cols, query.device)
    if problem.keep is not None:
        keep = keep & problem.keep
    keep = keep.expand(scores.shape)
    if scores.numel() == 0:
        return scores, scores, keep
    return row_weights(scores, keep, rows, problem.variant, problem.options), scores, keep


def _tanh(x: Tensor) -> Tensor:
    """tanh whose slope does not cancel, as torch's 1 - tanh^2 does, where it is nearly flat."""
    e = (-2 * x.abs()).exp()
    return torch.where(x.abs() < 1, x.tanh(), x.sign() * (1 - e) / (1 + e))


def row_weights(
    scores: Tensor, keep: Tensor, rows: Rows, variant: Variant, options: Mapping[str, Any]
) -> Tensor:
    """What the variant makes of rows of scores: 0 for hidden keys and in rows that see none.

    Args:
        scores: `[batch, heads, rows, keys]`, float32 or float64, anything where keys are hidden.
        keep: bool, of the same shape, True where a key is visible.
        rows: what the variant may know about the rows.
        options: all options of the variant, learned ones as in `Problem`.
    """
    hidden = variant.hidden_score(options)
    shown = scores.masked_fill(~keep, hidden).masked_fill(rows.visible == 0, 0.0)
    numerator, denominator = variant.ratio(shown, rows, **options)
    if denominator is not None:
        empty = denominator == 0
        numerator = numerator.masked_fill(empty, 0.0) / denominator.masked_fill(empty, 1.0)
    return numerator.masked_fill(~keep, 0.0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, want_stats: bool = False
) -> tuple[Tensor, Tensor, RowStats | None]:
    """Output, weights (as applied, after dropout) and, if wanted, the row statistics."""
    dtype = compute_dtype(value)
    w, scores, keep = weights(query.to(dtype), key.to(dtype), problem)
    stats = row_stats(w, scores, keep) if want_stats else None
    if problem.dropout is not None:
        batch, heads, rows, cols = (slice(0, size) for size in w.shape)
        w = w * problem.dropout.factor(batch, heads, rows, cols, like=w)
    grouped = w.unflatten(1, (value.shape[1], w.shape[1] // value.shape[1]))
    out = (grouped @ value.to(dtype).unsqueeze(2)).flatten(1, 2)
    return out.to(value.dtype), w, stats


@torch.no_grad()
def weights_and_stats(
    query: Tensor, key: Tensor, problem: Problem, want_weights: bool, want_stats: bool
) -> tuple[Tensor | None, RowStats | None]:
    """As `chunked.weights_and_stats`."""
    _, w, stats = attention(query, key, key, problem, want_stats)
    return w if want_weights else None, stats


def row_stats(w: Tensor, scores: Tensor, keep: Tensor) -> RowStats:
    """Statistics of rows of weights; `w` is 0 and `scores` anything where `keep` is False."""
    w, scores = w.detach(), scores.detach().masked_fill(~keep, -math.inf)
    largest = w.amax(-1) if w.numel() else w.sum(-1)
    return RowStats(keep.sum(-1), w.sum(-1), largest, scores.logsumexp(-1))
