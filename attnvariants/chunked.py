"""The chunked engine: blocks of rows that fit the cache, on any device, in O(tokens) memory.

Nothing above a causal diagonal or outside a window is computed. The backward recomputes each
block and differentiates the variant's own formula (`fused` where it has one, else `ratio`), so
every variant works from its reference formula alone. Gradients of second order are those of
`second_order`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import context, second_order
from attnvariants.autocast import no_autocast
from attnvariants.blocks import Block, blocks
from attnvariants.problem import Problem, RowStats, block_of, compute_dtype, pick
from attnvariants.reference import row_stats

# Rows whose largest score is below this lose nothing that counts to a change of its unit.
_UNIT_RANGE = 16.0


class WeightBlock(NamedTuple):
    """Weights of some rows; keys outside `cols` have weight 0 for these rows.

    Attributes:
        batch, heads, rows, cols: slices of batch, query heads, queries and keys.
        weights: `[batch, heads, rows, cols]`, 0 where hidden; before dropout.
        keep: bool, broadcasts to the same shape: True where visible.
        scores: `[batch, heads, rows, cols]`, what the variant turned into weights; not
            meaningful where hidden.
    """

    batch: slice
    heads: slice
    rows: slice
    cols: slice
    weights: Tensor
    keep: Tensor
    scores: Tensor


class _Part:
    """The scores of one block, their weights, and the way back from the scores' gradient."""

    def __init__(self, block: Block, q: Tensor, k: Tensor, problem: Problem):
        self.block, self.problem = block, problem
        variant = problem.variant
        self.formula = variant.ratio if variant.fused is None else variant.fused
        self.unit = 1.0 if variant.fused is None else variant.fused_unit
        shaped = problem.softcap or problem.slopes is not None or problem.bias is not None
        # the unit of `fused` goes into the scale where nothing comes between
        self.late_unit = self.unit if shaped else 1.0
        # what the scores are in units of until they are shown
        self.early_unit = self.unit / self.late_unit
        self.scale = problem.scale * self.early_unit
        self.q = block.group(block.queries(q) * self.scale)
        self.k = block.keys(k)
        self.scores = block.ungroup(torch.matmul(self.q, self.k.transpose(-1, -2)))
        self.capped: Tensor | None = None
        self._factors: Tensor | None = None
        if problem.softcap:
            self.capped = self.scores.div_(problem.softcap)
            self.scores = self.capped.tanh().mul_(problem.softcap)
        if problem.slopes is not None:
            slopes = pick(pick(problem.slopes, 0, block.batch), 1, block.heads)
            self.scores -= slopes[..., None, None] * self._distance()
        if problem.bias is not None:
            self.scores += block_of(problem.bias, *block.where)
        self.hidden_keys = None if problem.keep is None else ~self.keep()
        self.rows = problem.rows(block.batch, block.heads, block.rows, q.dtype)
        self.blind = self.rows.visible == 0 if problem.any_blind else None

    def _distance(self) -> Tensor:
        block = self.block
        distance = self.problem.geometry.distance(block.rows, block.cols, self.scores.device)
        return distance.abs_().to(self.scores.dtype)

    def keep(self) -> Tensor:
        """Visibility, bool, broadcasting to [batch, heads, rows, cols]."""
        block, problem = self.block, self.problem
        if problem.keep is None:
            return problem.geometry.keep(block.rows, block.cols, self.scores.device)[None, None]
        keep = block_of(problem.keep, *block.where)
        if problem.geometry.unlimited:
            return keep
        return keep & problem.geometry.keep(block.rows, block.cols, keep.device)

    def _hide(self, tensor: Tensor, value: float) -> None:
        if self.hidden_keys is not None:
            tensor.masked_fill_(self.hidden_keys, value)
            return
        block, geometry = self.block, self.problem.geometry
        for edge in geometry.edges(block.rows, block.cols):
            hidden = self.problem.hidden_edge(block.rows, edge, tensor.device)
            start = edge.start - block.cols.start
            tensor[..., start : start + edge.stop - edge.start].masked_fill_(hidden, value)

    def shown(self) -> Tensor:
        """The scores times `unit`, overwritten where hidden by the score that means so."""
        self._hide(self.scores, self.problem.hidden * self.early_unit)
        if self.blind is not None:
            self.scores.masked_fill_(self.blind, 0.0)
        if self.late_unit != 1:
            self._multiply_late()
        return self.scores

    def _multiply_late(self) -> None:
        """Change the unit of scores whose offset, as a bias of -3e4, would be rounded by it."""
        peak = self.scores.amax(-1, keepdim=True)
        if self.problem.variant.softmax_scores:
            self.scores.sub_(peak)
        elif not float(peak.abs().max()) < _UNIT_RANGE:
            # the formula itself tells a row's offset, and has another unit
            self.formula, self.unit, self.late_unit = self.problem.variant.ratio, 1.0, 1.0
            return
        self.scores.mul_(self.late_unit)

    def options(self) -> dict[str, Any]:
        """The variant's options, learned ones narrowed to the block's heads."""
        return {
            name: pick(value, 0, self.block.heads) if isinstance(value, Tensor) else value
            for name, value in self.problem.options.items()
        }

    def ratio(self, shown: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Numerator and a denominator that is nowhere 0."""
        numerator, denominator = self.formula(shown, self.rows, **options)
        if denominator is not None:
            denominator = denominator.masked_fill(denominator == 0, 1.0)
        if self.blind is not None:
            numerator = numerator.masked_fill(self.blind, 0.0)
        return numerator, denominator

    def drop(self, tensor: Tensor) -> Tensor:
        """`tensor` times the block's dropout factors."""
        dropout = self.problem.dropout
        if dropout is None:
            return tensor
        if self._factors is None:
            self._factors = dropout.factor(*self.block.where, tensor)
        return tensor * self._factors

    def backward(self, grad: Tensor, into: _Grads) -> None:
        """Add what the gradient of the shown scores means for query, key, bias and slopes."""
        block = self.block
        self._hide(grad, 0.0)
        if self.late_unit != 1:
            grad = grad * self.late_unit
        if into.bias is not None:
            part = block_of(into.bias, *block.where)
            part += grad.sum_to_size(part.shape)
        if into.slopes is not None:
            part = pick(pick(into.slopes, 0, block.batch), 1, block.heads)
            part -= (grad * self._distance()).sum((-1, -2)).sum_to_size(part.shape)
        if self.capped is not None:
            grad = grad * _tanh_slope(self.capped)
        grad = block.group(grad)
        if into.query is not None:
            part = block.ungroup(torch.matmul(grad, self.k))
            torch.mul(part, self.scale, out=block.queries(into.query))
        if into.key is not None:
            block.keys(into.key).add_(torch.matmul(grad.transpose(-1, -2), self.q))


def _tanh_slope(x: Tensor) -> Tensor:
    """1 - tanh(x)^2 without its cancellation where tanh is near 1."""
    e = x.abs().mul_(-2).exp_()
    below = (1 + e).square_()
    return e.mul_(4).div_(below)


@dataclass
class _Grads:
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    learned: dict[str, Tensor]


def _ready(tensor: Tensor) -> Tensor:
    return tensor.detach().to(compute_dtype(tensor)).contiguous()


@torch.no_grad()
def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call, in the compute dtype and without a gradient."""
    q, k, v = _ready(query), _ready(key), _ready(value)
    batch, heads, q_len = q.shape[:3]
    out = v.new_zeros(batch, heads, q_len, v.shape[-1])
    for block in blocks(batch, k.shape[1], heads // k.shape[1], problem):
        part = _Part(block, q, k, problem)
        numerator, denominator = part.ratio(part.shown(), part.options())
        numerator = block.group(part.drop(numerator))
        result = block.ungroup(torch.matmul(numerator, block.keys(v)))
        target = block.queries(out)
        if denominator is None:
            target.copy_(result)
        else:
            torch.div(result, denominator, out=target)
    return out


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    into: _Grads,
) -> None:
    q, k, v = _ready(query), _ready(key), _ready(value)
    grad_out = grad_out.to(v.dtype)
    batch, heads = q.shape[:2]
    for block in blocks(batch, k.shape[1], heads // k.shape[1], problem):
        with torch.no_grad():
            part = _Part(block, q, k, problem)
            shown = part.shown().detach()
            options = part.options()
        leaves = {name: options[name].detach().requires_grad_() for name in into.learned}
        with torch.enable_grad():
            numerator, denominator = part.ratio(shown.requires_grad_(), {**options, **leaves})
        with torch.no_grad():
            # out = dropped numerator @ value / denominator
            d_out = block.queries(grad_out)
            d_out = d_out if denominator is None else d_out / denominator
            d_numerator = torch.matmul(block.group(d_out), block.keys(v).transpose(-1, -2))
            d_numerator = part.drop(block.ungroup(d_numerator))
            if into.value is not None:
                dropped = block.group(part.drop(numerator.detach()))
                d_value = torch.matmul(dropped.transpose(-1, -2), block.group(d_out))
                block.keys(into.value).add_(d_value)
            outputs, cotangents = [numerator], [d_numerator]
            if denominator is not None and denominator.requires_grad:
                outputs.append(denominator)
                # d_out . out, summed as the formula's backward sums: a row of one key cancels
                d_denominator = -torch.linalg.vecdot(numerator, d_numerator).unsqueeze(-1)
                d_denominator = d_denominator / denominator
                cotangents.append(d_denominator.sum_to_size(denominator.shape))
        found = torch.autograd.grad(
            outputs, [shown, *leaves.values()], cotangents, allow_unused=True
        )
        with torch.no_grad():
            if found[0] is not None:
                part.backward(found[0], into)
            for name, grad in zip(leaves, found[1:], strict=True):
                if grad is not None:
                    target = pick(into.learned[name], 0, block.heads)
                    target += grad.sum_to_size(target.shape)


def gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of query, key, value, bias, slopes and each learned option; None if not needed.

    Args:
        needs: which of them are wanted.
    """
    bias, slopes, learned = problem.bias, problem.slopes, problem.learned
    of = query, key, value, bias, slopes, *learned.values()
    dtype = compute_dtype(value)
    grads = [
        torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        if tensor is not None and need
        else None
        for tensor, need in zip(of, needs, strict=True)
    ]
    dq, dk, dv, dbias, dslopes, *dlearned = grads
    named = zip(learned, dlearned, strict=True)
    wanted = {name: grad for name, grad in named if grad is not None}
    into = _Grads(dq, dk, dv, dbias, dslopes, wanted)
    _backward(grad_out, query, key, value, problem, into)
    return [
        grad if grad is None or tensor is None else grad.to(tensor.dtype)
        for tensor, grad in zip(of, grads, strict=True)
    ]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, query, key, value, *rest):
        out = forward(query, key, value, problem)
        ctx.bare, tensors = second_order.held(problem)
        ctx.names = list(problem.learned)
        ctx.save_for_backward(query, key, value, *tensors)
        return out.to(value.dtype)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, *tensors = ctx.saved_tensors
        problem = second_order.whole(ctx.bare, ctx.names, tensors)
        needs = ctx.needs_input_grad[1:]
        return None, *second_order.differentiable(
            gradients, grad_out, query, key, value, problem, needs
        )


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call, `[batch, heads, q_len, value_dim]`."""
    return _Attention.apply(
        problem, query, key, value, problem.bias, problem.slopes, *problem.learned.values()
    )


def weight_blocks(query: Tensor, key: Tensor, problem: Problem) -> Iterator[WeightBlock]:
    """The weights of a prepared call, block by block, without a gradient."""
    q, k = _ready(query), _ready(key)
    batch, heads = q.shape[:2]
    by_reference = not context.plain() or context.shapes_alone(q)
    for block in blocks(batch, k.shape[1], heads // k.shape[1], problem):
        if by_reference:
            with torch.no_grad(), no_autocast(q):
                weights, scores, keep = second_order.weights_of(block, q, k, problem)
            yield WeightBlock(*block.where, weights, keep, scores)
            continue
        with torch.no_grad(), no_autocast(q):
            part = _Part(block, q, k, problem)
            scores = part.scores / part.early_unit
            numerator, denominator = part.ratio(part.shown(), part.options())
            if denominator is not None:
                numerator = numerator.div_(denominator)
            part._hide(numerator, 0.0)
        yield WeightBlock(*block.where, numerator, part.keep(), scores)


@torch.no_grad()
def weights_and_stats(
    query: Tensor, key: Tensor, problem: Problem, want_weights: bool, want_stats: bool
) -> tuple[Tensor | None, RowStats | None]:
    """Dense weights (as applied, after dropout) and the row statistics, without a gradient."""
    dtype = compute_dtype(query)
    shape = *query.shape[:3], key.shape[2]
    dense = torch.zeros(shape, dtype=dtype, device=query.device) if want_weights else None
    stats = None
    if want_stats:
        zeros = torch.zeros(shape[:3], dtype=dtype, device=query.device)
        unseen = torch.full_like(zeros, -math.inf)
        stats = RowStats(torch.zeros_like(zeros, dtype=torch.int64), zeros, zeros.clone(), unseen)
    for block in weight_blocks(query, key, problem):
        where = block.batch, block.heads, block.rows
        if stats is not None:
            keep = block.keep.expand(block.weights.shape)
            for target, part in zip(
                stats, row_stats(block.weights, block.scores, keep), strict=True
            ):
                target[where] = part
        if dense is not None:
            w, dropout = block.weights, problem.dropout
            if dropout is not None:
                w = w * dropout.factor(*where, block.cols, w)
            dense[where][..., block.cols] = w
    return dense, stats
