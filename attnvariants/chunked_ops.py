"""The chunked engine as operators of torch, for calls that are being compiled or exported.

Its loop over blocks reads masks and the number of threads, which a graph cannot: as
`attnvariants::chunked_forward`, `attnvariants::chunked_backward` and
`attnvariants::chunked_weights` a call is one node of it. The operators name the variant as those
of `attnvariants.ops` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import register_decomposition

from attnvariants import chunked, reference, second_order
from attnvariants.autocast import no_autocast
from attnvariants.context import readable
from attnvariants.dropout import Dropout
from attnvariants.geometry import Geometry
from attnvariants.ops import _key_of, _literal, _options_of, _variant_of
from attnvariants.problem import Problem, RowStats, compute_dtype
from attnvariants.registry import Variant


class _Facts(NamedTuple):
    """The end of both schemas: all of a call that is no tensor; -1 is an unlimited side."""

    names: str
    variant: str
    options: str
    scale: float
    softcap: float
    dropout_p: float
    offset: int
    left: int
    right: int


_INPUTS = "Tensor query, Tensor key, Tensor value"
# as a Problem has them; the seed is one int64 on the CPU, the names are those of `learned`
_SHARED = (
    "Tensor? keep, Tensor? bias, Tensor? slopes, Tensor[] learned, Tensor? position, Tensor? seed, "
    "{}str names, str variant, str options, float scale, float softcap, float dropout_p, "
    "SymInt offset, SymInt left, SymInt right"
)
_FORWARD = f"({_INPUTS}, {_SHARED.format('')}) -> Tensor"
_BACKWARD = f"(Tensor grad_out, {_INPUTS}, {_SHARED.format('bool[] needs, ')}) -> Tensor[]"
_WEIGHTS = (
    "(Tensor query, Tensor key, "
    f"{_SHARED.format('bool want_weights, bool want_stats, ')}) -> Tensor[]"
)

torch.library.define("attnvariants::chunked_forward", _FORWARD)
torch.library.define("attnvariants::chunked_backward", _BACKWARD)
torch.library.define("attnvariants::chunked_weights", _WEIGHTS)


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """`chunked.attention` as one operator.

    Args:
        query: as prepared.
        key: as prepared.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        problem: the call.

    Returns:
        `[batch, heads, q_len, value_dim]` in value's dtype.
    """
    shared, facts = _arguments(problem)
    out = torch.ops.attnvariants.chunked_forward(query, key, value, *shared, *facts)
    return out.to(value.dtype)


def weights_and_stats(
    query: Tensor, key: Tensor, problem: Problem, want_weights: bool, want_stats: bool
) -> tuple[Tensor | None, RowStats | None]:
    """`chunked.weights_and_stats` as one operator."""
    shared, facts = _arguments(problem)
    wants = want_weights, want_stats
    weights, *stats = torch.ops.attnvariants.chunked_weights(query, key, *shared, *wants, *facts)
    return weights if want_weights else None, RowStats(*stats) if want_stats else None


def _arguments(problem: Problem) -> tuple[tuple[Any, ...], _Facts]:
    """All of a call but query, key and value, as the operators take it."""
    geometry, dropout, learned = problem.geometry, problem.dropout, problem.learned
    plain = {k: v for k, v in problem.options.items() if k not in learned}
    seed, position = None, problem.position
    if dropout is not None:
        seed = (
            dropout.seed
            if isinstance(dropout.seed, Tensor)
            else torch.tensor(dropout.seed, device="cpu")
        )
    if position is not None and not isinstance(position, Tensor):
        position = torch.tensor(position, device=problem.device)
    tensors = problem.keep, problem.bias, problem.slopes, list(learned.values()), position, seed
    return tensors, _Facts(
        " ".join(learned),
        _key_of(problem.variant),
        _literal(plain),
        problem.scale,
        problem.softcap,
        0.0 if dropout is None else dropout.p,
        geometry.offset,
        -1 if geometry.left is None else geometry.left,
        -1 if geometry.right is None else geometry.right,
    )


def _problem_of(
    query: Tensor,
    key: Tensor,
    shared: tuple[Any, ...],
    facts: _Facts,
    variant: Variant | None = None,
) -> Problem:
    """The call again; `variant` if its name may have gone to another one since."""
    keep, bias, slopes, learned, position, seed = shared
    heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
    left, right = (None if side < 0 else side for side in (facts.left, facts.right))
    named = zip(facts.names.split(), learned, strict=True)
    dropout = None
    if seed is not None:
        drawn = int(seed) if readable(seed) else seed
        dropout = Dropout(facts.dropout_p, drawn, heads, q_len, kv_len)
    return Problem(
        variant=variant or _variant_of(facts.variant),
        options={**_options_of(facts.options), **dict(named)},
        geometry=Geometry(q_len, kv_len, facts.offset, left, right),
        scale=facts.scale,
        softcap=facts.softcap,
        tokens_q=q_len,
        device=query.device,
        keep=keep,
        bias=bias,
        slopes=slopes,
        dropout=dropout,
        position=position,
    )


@torch.library.impl("attnvariants::chunked_forward", "CompositeExplicitAutograd")
def _run_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    problem = _problem_of(query, key, rest[:6], _Facts(*rest[6:]))
    with no_autocast(query):
        return chunked.forward(query, key, value, problem)


@torch.library.register_fake("attnvariants::chunked_forward")
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[3], dtype=compute_dtype(value))


@torch.library.impl("attnvariants::chunked_backward", "CompositeExplicitAutograd")
def _run_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> list[Tensor]:
    """Gradients of query, key, value, bias, slopes and what is learned; empty if not needed."""
    needs, facts = rest[6], _Facts(*rest[7:])
    problem = _problem_of(query, key, rest[:6], facts)
    with no_autocast(query), _autograd():
        grads = chunked.gradients(grad_out, query, key, value, problem, needs)
    return [query.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


def _autograd() -> Any:
    """Autograd as outside of operators: under a dispatch mode their bodies have none."""
    included, excluded = (
        torch._C._dispatch_tls_local_include_set(),
        torch._C._dispatch_tls_local_exclude_set(),
    )
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    return torch._C._ForceDispatchKeyGuard(included, excluded - autograd)


@torch.library.register_fake("attnvariants::chunked_backward")
def _fake_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> list[Tensor]:
    likes = query, key, value, *rest[1:3], *rest[3]
    return [
        like.new_empty(like.shape) if need else query.new_empty(0)
        for like, need in zip(likes, rest[6], strict=True)
    ]


@torch.library.impl("attnvariants::chunked_weights", "CompositeExplicitAutograd")
def _run_weights(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    """The weights, empty if not wanted, and the four row statistics, likewise."""
    problem = _problem_of(query, key, rest[:6], _Facts(*rest[8:]))
    weights, stats = chunked.weights_and_stats(query, key, problem, *rest[6:8])
    found = [weights, *((None,) * 4 if stats is None else stats)]
    # a graph may hold no output twice
    return [query.new_empty(0) if tensor is None else tensor for tensor in found]


@torch.library.register_fake("attnvariants::chunked_weights")
def _fake_weights(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    want_weights, want_stats = rest[6:8]
    rows, dtype = query.shape[:3], compute_dtype(query)
    dense = query.new_empty((*rows, key.shape[2]) if want_weights else (0,), dtype=dtype)
    shape = tuple(rows) if want_stats else (0,)
    return [dense, *(query.new_empty(shape, dtype=kind) for kind in (torch.int64, *[dtype] * 3))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    learned = inputs[6]
    ctx.count = len(learned)
    ctx.save_for_backward(*inputs[:6], *learned, *inputs[7:9])
    ctx.facts = _Facts(*inputs[9:])
    # the name may go to another variant before the backward
    ctx.variant = _variant_of(ctx.facts.variant)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    learned, (position, seed) = tensors[6 : 6 + ctx.count], tensors[6 + ctx.count :]
    query, key, value, *shared = tensors[:6]
    needs, facts = ctx.needs_input_grad, ctx.facts
    problem = _problem_of(query, key, (*shared, learned, position, seed), facts, ctx.variant)
    wanted = [*needs[:3], *needs[4:6], *needs[6]]
    grads = second_order.differentiable(_gradients, grad_out, query, key, value, problem, wanted)
    return (
        *grads[:3],
        None,
        *grads[3:5],
        grads[5:],
        *(None,) * (2 + len(facts)),
    )


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`chunked.gradients` as one operator."""
    shared, facts = _arguments(problem)
    inputs = query, key, value, *shared
    found = torch.ops.attnvariants.chunked_backward(grad_out, *inputs, list(needs), *facts)
    return [grad if need else None for grad, need in zip(found, needs, strict=True)]


torch.library.register_autograd(
    "attnvariants::chunked_forward", _differentiate, setup_context=_setup
)


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    problem = _problem_of(query, key, rest[:6], _Facts(*rest[6:]))
    return reference.attention(query, key, value.to(compute_dtype(value)), problem)[0]


def _plain_weights(query: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    problem = _problem_of(query, key, rest[:6], _Facts(*rest[8:]))
    weights, stats = reference.weights_and_stats(query, key, problem, *rest[6:8])
    found = [weights, *((None,) * 4 if stats is None else stats)]
    return [query.new_empty(0) if tensor is None else tensor for tensor in found]


# what torch.onnx.export makes of the operators in a program that torch.export recorded; with a
# "meta" of their own, fake tensors do not go through it
for _operator, _fake, _plain in (
    ("chunked_forward", _fake_forward, _plain_forward),
    ("chunked_weights", _fake_weights, _plain_weights),
):
    _overload = getattr(torch.ops.attnvariants, _operator).default
    register_decomposition(_overload, type="meta")(_fake)
    register_decomposition(_overload)(_plain)
