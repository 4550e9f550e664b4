"""Gradients of the chunked engine's gradients, block by block, from the variant's `ratio`.

The gradients are sums over blocks, and so is what their own backward gives: each block is computed
again by the reference formula and differentiated twice, in O(tokens) memory; or thrice, as
torch.autograd.functional.hvp asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnvariants import context, reference
from attnvariants.blocks import Block, blocks
from attnvariants.problem import Problem, block_of, compute_dtype, pick

# query, key, value, bias, slopes and each learned option
Inputs = Sequence[Tensor | None]
Gradients = Callable[..., list[Tensor | None]]

_NO_FOURTH = (
    "impl='chunked' has gradients of first to third order only; use impl='reference' to "
    "differentiate four times."
)
_NO_MAPPED_THIRD = (
    "impl='chunked' has no third derivatives that a vmap maps; use impl='reference' for them, or "
    "differentiate one at a time."
)


def held(problem: Problem) -> tuple[Problem, Inputs]:
    """A problem without its tensors, and these: keep, bias, slopes and each learned option.

    A function's context keeps them apart: what it saves notices if it is changed in place.
    """
    learned = problem.learned
    plain = {name: value for name, value in problem.options.items() if name not in learned}
    bare = replace(problem, options=plain, bias=None, slopes=None, keep=None)
    return bare, (problem.keep, problem.bias, problem.slopes, *learned.values())


def whole(bare: Problem, names: Sequence[str], tensors: Inputs) -> Problem:
    """The problem again that `held` took apart; `names` are those of the learned options."""
    keep, bias, slopes, *learned = tensors
    options = {**bare.options, **dict(zip(names, learned, strict=True))}
    return replace(bare, options=options, bias=bias, slopes=slopes, keep=keep)


def differentiable(
    first: Gradients,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`first`, which is `chunked.gradients`, with gradients of its own; arguments as it has them.

    Where a vmap maps the incoming gradients, torch's own operators compute all of it, densely.
    """
    if context.mapped(grad_out):
        inputs = query, key, value, problem.bias, problem.slopes, *problem.learned.values()
        return _dense(grad_out, _aliases(inputs), problem, needs, torch.is_grad_enabled())
    if not torch.is_grad_enabled():
        return first(grad_out, query, key, value, problem, needs)
    bare, (keep, *rest) = held(problem)
    call = first, bare, list(problem.learned), list(needs)
    return list(_First.apply(*call, keep, grad_out, query, key, value, *rest))


class _First(torch.autograd.Function):
    """The gradients as a function of the incoming gradient and all inputs."""

    @staticmethod
    def forward(ctx, first, bare, names, needs, keep, grad_out, query, key, value, *rest):
        ctx.save_for_backward(keep, grad_out, query, key, value, *rest)
        ctx.call = bare, names
        ctx.set_materialize_grads(False)
        problem = whole(bare, names, (keep, *rest))
        return tuple(first(grad_out, query, key, value, problem, needs))

    @staticmethod
    def backward(ctx, *cotangents):
        keep, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:]
        count = len(cotangents)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (5 + len(needs))
        if any(context.mapped(tensor) for tensor in cotangents if tensor is not None):
            bare, names = ctx.call
            problem = whole(bare, names, (keep, *tensors[4:]))
            return (None,) * 5 + tuple(_dense_second(cotangents, tensors, problem, needs))
        grads = _Second.apply(*ctx.call, needs, count, keep, *cotangents, *tensors)
        return (None,) * 5 + tuple(grads)


class _Second(torch.autograd.Function):
    """What the backward of `_First` gives."""

    @staticmethod
    def forward(ctx, bare, names, needs, count, keep, *tensors):
        ctx.save_for_backward(keep, *tensors)
        ctx.call = bare, names, count
        ctx.set_materialize_grads(False)
        cotangents, tensors = tensors[:count], tensors[count:]
        problem = whole(bare, names, (keep, *tensors[4:]))
        return tuple(_second(cotangents, tensors, problem, needs))

    @staticmethod
    def backward(ctx, *grads):
        if any(context.mapped(grad) for grad in grads if grad is not None):
            raise NotImplementedError(_NO_MAPPED_THIRD)
        needs = ctx.needs_input_grad[5:]
        if all(grad is None for grad in grads):
            return (None,) * (5 + len(needs))
        found = _Third.apply(*ctx.call, needs, *ctx.saved_tensors, *grads)
        return (None,) * 5 + tuple(found)


class _Third(torch.autograd.Function):
    """What the backward of `_Second` gives, as a product of a Hessian and a vector asks for it."""

    @staticmethod
    def forward(ctx, bare, names, count, needs, keep, *tensors):
        middle = len(needs)
        cotangents, tensors, grads = tensors[:count], tensors[count:middle], tensors[middle:]
        problem = whole(bare, names, (keep, *tensors[4:]))
        return tuple(_third(grads, cotangents, tensors, problem, needs))

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_NO_FOURTH)


# pairs of what is differentiated next and the weight with which it is
Pairs = list[tuple[Tensor, Tensor]]


def _second(
    cotangents: Inputs, tensors: Inputs, problem: Problem, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of sum <cotangent, gradient> to the incoming gradient and all inputs."""

    def first(block: Block, part: Problem, fixed: Inputs, leaves: Sequence[Inputs]) -> Pairs:
        return _first(block, part, fixed, leaves[0])

    return _sum_over_blocks(first, (None, *cotangents), [tensors], problem, needs)


def _third(
    grads: Inputs, cotangents: Inputs, tensors: Inputs, problem: Problem, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of sum <grad, what `_second` gives> to its cotangents and tensors."""

    def second(block: Block, part: Problem, fixed: Inputs, leaves: Sequence[Inputs]) -> Pairs:
        return _weighed(_first(block, part, *leaves), leaves[1], fixed)

    groups = [(None, *cotangents), tensors]
    return _sum_over_blocks(second, grads, groups, problem, (False, *needs))[1:]


def _first(block: Block, part: Problem, cotangents: Inputs, leaves: Inputs) -> Pairs:
    """The gradients of a block to its inputs, with their cotangents."""
    grad_out = leaves[0]
    assert grad_out is not None
    return _weighed([(_output(block, leaves[1:], part), grad_out)], leaves, cotangents)


def _weighed(of: Pairs, leaves: Inputs, weights: Inputs) -> Pairs:
    """Gradients of a weighted sum to the leaves that have a weight of their own, with it."""
    asked = [
        (leaf, weight)
        for leaf, weight in zip(leaves, weights, strict=True)
        if leaf is not None and weight is not None
    ]
    found = _gradient(of, [leaf for leaf, _ in asked], True)
    return [
        (grad, weight)
        for grad, (_, weight) in zip(found, asked, strict=True)
        if grad is not None and grad.requires_grad
    ]


def _gradient(of: Pairs, to: Sequence[Tensor], again: bool) -> Sequence[Tensor | None]:
    """Gradients of a weighted sum, to be differentiated `again` or not."""
    if not of or not to:
        return [None] * len(to)
    each, weights = zip(*of, strict=True)
    return torch.autograd.grad(each, to, weights, create_graph=again, allow_unused=True)


def _sum_over_blocks(
    derive: Callable[[Block, Problem, Inputs, Sequence[Inputs]], Pairs],
    fixed: Inputs,
    groups: Sequence[Inputs],
    problem: Problem,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the weighted sums that `derive` gives of each block, to what is needed.

    Args:
        derive: of a block, its problem, and its parts of `fixed` and of `groups`.
        fixed: the incoming gradient and all inputs, or what has their shapes.
        groups: likewise, each; the last are the incoming gradient and the inputs themselves.
        needs: of all groups, one after another.
    """
    size = len(fixed)
    of = [tensor for group in groups for tensor in group]
    ready = [None if tensor is None else _ready(tensor) for tensor in of]
    fixed = [None if tensor is None else _ready(tensor) for tensor in fixed]
    into = [
        torch.zeros_like(tensor) if tensor is not None and need else None
        for tensor, need in zip(ready, needs, strict=True)
    ]
    _, query, key, *_ = ready[-size:]
    assert query is not None
    assert key is not None
    for block in blocks(query.shape[0], key.shape[1], query.shape[1] // key.shape[1], problem):
        part = _cut(block, problem)
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_()
            for tensor in _each(block, ready, size)
        ]
        with torch.enable_grad():
            pairs = derive(block, part, _parts(block, fixed), _cut_up(leaves, size))
        targets = [
            (leaf, total)
            for leaf, total in zip(leaves, _each(block, into, size), strict=True)
            if leaf is not None and total is not None
        ]
        found = _gradient(pairs, [leaf for leaf, _ in targets], False)
        for grad, (_, total) in zip(found, targets, strict=True):
            if grad is not None:
                total += grad
    return [
        None if total is None or tensor is None else total.to(tensor.dtype)
        for total, tensor in zip(into, of, strict=True)
    ]


def _cut_up(tensors: Inputs, size: int) -> list[Inputs]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


def _each(block: Block, tensors: Inputs, size: int) -> list[Tensor | None]:
    """A block's views of several groups, one after another."""
    return [tensor for group in _cut_up(tensors, size) for tensor in _parts(block, group)]


def _ready(tensor: Tensor) -> Tensor:
    return tensor.detach().to(compute_dtype(tensor))


def _parts(block: Block, tensors: Inputs) -> list[Tensor | None]:
    """A block's views of the incoming gradient and all inputs, or of what has their shapes."""
    grad_out, query, key, value, bias, slopes, *learned = tensors
    return [
        None if grad_out is None else block.queries(grad_out),
        None if query is None else block.queries(query),
        None if key is None else block.keys(key),
        None if value is None else block.keys(value),
        None if bias is None else block_of(bias, *block.where),
        None if slopes is None else pick(pick(slopes, 0, block.batch), 1, block.heads),
        *(None if option is None else pick(option, 0, block.heads) for option in learned),
    ]


def weights_of(
    block: Block, query: Tensor, key: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scores and visibility of a block of a call, by the reference formula."""
    inputs = None, query, key, None, problem.bias, problem.slopes, *problem.learned.values()
    _, q, k, _, *rest = _parts(block, inputs)
    assert q is not None
    assert k is not None
    return _weights(block, q, k, rest, _cut(block, problem))


def _cut(block: Block, problem: Problem) -> Problem:
    """The problem with the mask of a block alone."""
    keep = problem.keep
    return problem if keep is None else replace(problem, keep=block_of(keep, *block.where))


def _weights(
    block: Block, query: Tensor, key: Tensor, rest: Inputs, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    bias, slopes, *learned = rest
    options = {**problem.options, **dict(zip(problem.learned, learned, strict=True))}
    part = replace(problem, options=options, bias=bias, slopes=slopes)
    rows = problem.rows(block.batch, block.heads, block.rows, query.dtype)
    return reference.weights_of(query, key, part, rows, block.rows, block.cols)


def _output(block: Block, leaves: Inputs, problem: Problem) -> Tensor:
    """A block's rows of the output, by the reference formula."""
    query, key, value, *rest = leaves
    assert query is not None
    assert key is not None
    assert value is not None
    w, _, _ = _weights(block, query, key, rest, problem)
    if problem.dropout is not None:
        w = w * problem.dropout.factor(*block.where, like=w)
    return block.ungroup(block.group(w) @ value)


def _dense(
    grad_out: Tensor, inputs: Inputs, problem: Problem, needs: Sequence[bool], again: bool
) -> list[Tensor | None]:
    """Gradients by torch alone, to be differentiated `again` or not."""
    query, key, value, bias, slopes, *learned = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    bare, (keep, *_) = held(problem)
    problem = whole(bare, list(problem.learned), (keep, bias, slopes, *learned))
    wanted = _needed(inputs, needs)
    with torch.enable_grad():
        out, _, _ = reference.attention(query, key, value, problem)
        found = torch.autograd.grad(out, wanted, grad_out, create_graph=again, allow_unused=True)
    return _spread(found, needs)


def _dense_second(
    cotangents: Inputs, tensors: Inputs, problem: Problem, needs: Sequence[bool]
) -> list[Tensor | None]:
    """As `_second`, by torch alone."""
    tensors = _aliases(tensors)
    grad_out, *inputs = tensors
    assert grad_out is not None
    asked = [cotangent is not None for cotangent in cotangents]
    first = _dense(grad_out, inputs, problem, asked, True)
    pairs = [
        (grad, cotangent)
        for grad, cotangent in zip(first, cotangents, strict=True)
        if grad is not None and grad.requires_grad
    ]
    found = torch.autograd.grad(
        [grad for grad, _ in pairs],
        _needed(tensors, needs),
        [cotangent for _, cotangent in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return _spread(found, needs)


@torch.enable_grad()
def _aliases(tensors: Inputs) -> list[Tensor | None]:
    """The same tensors, none of which depends on another as far as autograd knows."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def _needed(tensors: Inputs, needs: Sequence[bool]) -> list[Tensor]:
    each = zip(tensors, needs, strict=True)
    return [tensor for tensor, need in each if need and tensor is not None]


def _spread(found: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """What was found, in the places where it was needed."""
    each = iter(found)
    return [next(each) if need else None for need in needs]
