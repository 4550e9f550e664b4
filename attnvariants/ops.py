"""The streaming kernels as two operators of torch: traceable, exportable, with gradients.

`attnvariants::streaming_forward` and `attnvariants::streaming_backward` name the variant by a
string, because an operator's schema has no functions. A registered variant goes by its name. A
`Variant` that was never registered gets a key that holds for this process only, and is remembered
for the life of it, since a backward may come at any time: register what you export or create often.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants import fused
from attnvariants.context import transformed
from attnvariants.problem import Problem
from attnvariants.registry import Variant, constant_when_compiled, get_variant, is_registered


class _Facts(NamedTuple):
    """The end of both schemas: all of a call that is no tensor; -1 is an unlimited side."""

    variant: str
    options: str
    scale: float
    softcap: float
    dropout_p: float
    offset: int
    left: int
    right: int
    max_q: int
    max_k: int


_INPUTS = "Tensor query, Tensor key, Tensor value"
# visibility, bias and slopes broadcast; boundaries are int32; the seed is one int64 on the CPU
_SHARED = (
    "Tensor? mask, Tensor? bias, Tensor? slopes, Tensor? visible, Tensor? cu_q, Tensor? cu_k, "
    "Tensor? seed, {}str variant, str options, float scale, float softcap, "
    "float dropout_p, SymInt offset, SymInt left, SymInt right, SymInt max_q, SymInt max_k"
)
_FORWARD = f"({_INPUTS}, {_SHARED.format('')}) -> (Tensor, Tensor)"
_WANTS = "bool wants_bias, bool wants_slopes, "
_BACKWARD = (
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor saved, {_SHARED.format(_WANTS)}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_unregistered: dict[str, Variant] = {}


def streaming(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call by the streaming kernels, differentiable.

    Args:
        query: as prepared; the kernels get query and key in value's dtype.
        key: likewise.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        problem: the call; its variant has `hooks`, its scale is positive.

    Returns:
        `[batch, heads, q_len, value_dim]` in value's dtype.
    """
    variant = _key_of(problem.variant)
    plain = {k: v for k, v in problem.options.items() if not isinstance(v, Tensor)}
    options = _literal(plain)
    geometry, dropout = problem.geometry, problem.dropout
    seed = None
    if dropout is not None:
        seed = (
            dropout.seed
            if isinstance(dropout.seed, Tensor)
            else torch.tensor(dropout.seed, device="cpu")
        )
    visible = None
    if problem.keep is not None and _needs_n(variant, options, value.dtype):
        # without a mask the kernels count by themselves
        visible = problem.visible.to(torch.int32)
    operator = _Forward.apply if transformed() else streaming_forward
    out, _ = operator(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        problem.keep,
        problem.bias,
        problem.slopes,
        visible,
        problem.cu_q,
        problem.cu_k,
        seed,
        *_Facts(
            variant,
            options,
            problem.scale,
            problem.softcap,
            0.0 if dropout is None else dropout.p,
            geometry.offset,
            -1 if geometry.left is None else geometry.left,
            -1 if geometry.right is None else geometry.right,
            geometry.q_len,
            geometry.kv_len,
        ),
    )
    return out


def _literal(options: dict[str, Any]) -> str:
    # keys of a dict are never symbolic: what hooks are picked by is fixed in a compiled call
    fixed = {name: list({value: None})[0] for name, value in options.items()}  # noqa: RUF015
    return "{" + ", ".join([f"{name!r}: {value!r}" for name, value in fixed.items()]) + "}"


@lru_cache(maxsize=1024)
def _options_of(literal: str) -> dict[str, Any]:
    return ast.literal_eval(literal)


def _key_of(variant: Variant) -> str:
    return variant.name if is_registered(variant) else _key_of_unregistered(variant)


@constant_when_compiled
def _key_of_unregistered(variant: Variant) -> str:
    key = f"<{id(variant)}>"
    _unregistered[key] = variant
    return key


def _variant_of(key: str) -> Variant:
    return _unregistered[key] if key in _unregistered else get_variant(key)


def _nominal_hooks(variant: str, options: str, dtype: torch.dtype) -> Any:
    """Hooks of some call: how much they save and whether they read n is the same in all sizes."""
    case = fused.case_of(dtype, 64, 1024, 0.125, False)
    return fused.hooks_of(_variant_of(variant), _options_of(options), case)


@constant_when_compiled
def _needs_n(variant: str, options: str, dtype: torch.dtype) -> bool:
    return _nominal_hooks(variant, options, dtype).needs_n


def _prepared(
    query: Tensor, key: Tensor, shared: tuple[Tensor | None, ...], facts: _Facts
) -> tuple[Any, Any]:
    """The kernels' description of a call, what broadcasts expanded without a copy; the hooks."""
    from attnvariants_kernels.streaming import Call

    mask, bias, slopes, visible, cu_q, cu_k, seed = shared
    rows = query.shape[:3]
    sequences = query.shape[0] if cu_q is None else cu_q.shape[0] - 1
    exact = torch.get_float32_matmul_precision() == "highest"
    furthest = rows[2] + key.shape[2] + abs(facts.offset)
    variant, options = _variant_of(facts.variant), _options_of(facts.options)
    shaped = bias is not None or slopes is not None
    case = fused.case_of(query.dtype, query.shape[3], facts.max_k, facts.scale, shaped)
    call = Call(
        scale=facts.scale,
        softcap=facts.softcap,
        offset=facts.offset,
        # kernels count in 32 bits
        left=None if facts.left < 0 else min(facts.left, furthest),
        right=None if facts.right < 0 else min(facts.right, furthest),
        mask=None if mask is None else mask.view(torch.uint8).expand(*rows, key.shape[2]),
        bias=None if bias is None else bias.expand(*rows, key.shape[2]),
        slopes=None if slopes is None else slopes.expand(sequences, rows[1]),
        visible=None if visible is None else visible.expand(rows),
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=facts.max_q,
        max_k=facts.max_k,
        dropout_p=facts.dropout_p,
        seed=0 if seed is None else int(seed),
        precision="ieee" if exact else "tf32",
        theta=fused.theta_of(variant, options, case),
    )
    return call, fused.hooks_of(variant, options, case)


def _per_slope(rows: Tensor, slopes: Tensor, cu_q: Tensor | None) -> Tensor:
    """Gradients of slopes by row, [batch, heads, q_len], summed to the slopes' shape and dtype."""
    if cu_q is None or slopes.shape[0] == 1:
        return rows.sum(-1).sum_to_size(slopes.shape).to(slopes.dtype)
    lengths = cu_q.diff().long()
    return torch.segment_reduce(rows[0].t().contiguous(), "sum", lengths=lengths, initial=0).to(
        slopes.dtype
    )


@torch.library.custom_op("attnvariants::streaming_forward", mutates_args=(), schema=_FORWARD)
def streaming_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    """Output `[batch, heads, q_len, value_dim]` and what the backward needs of each row."""
    from attnvariants_kernels import streaming

    call, hooks = _prepared(query, key, rest[:7], _Facts(*rest[7:]))
    out, saved = streaming.forward(query, key, value, call, hooks)
    return out.contiguous(), saved.contiguous()


@streaming_forward.register_fake
def _(query, key, value, *rest):
    facts = _Facts(*rest[7:])
    rows = query.shape[:3]
    saves = _nominal_hooks(facts.variant, facts.options, value.dtype).saves
    out = value.new_empty(*rows, value.shape[3])
    return out, query.new_empty(saves, *rows, dtype=torch.float32)


@torch.library.custom_op("attnvariants::streaming_backward", mutates_args=(), schema=_BACKWARD)
def streaming_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    saved: Tensor,
    *rest: Any,
) -> Any:
    """Gradients of query, key, value, bias and slopes; of the last two empty if not wanted."""
    from attnvariants_kernels import streaming

    _, bias, slopes = rest[:3]
    wants_bias, wants_slopes = rest[7:9]
    call, hooks = _prepared(query, key, rest[:7], _Facts(*rest[9:]))
    *grads, dbias, dslopes = streaming.backward(
        grad_out, query, key, value, out, saved, call, hooks, wants_bias, wants_slopes
    )
    if wants_bias:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    if wants_slopes:
        dslopes = _per_slope(dslopes, slopes, call.cu_q)
    grads += [
        dbias if wants_bias else query.new_empty(0),
        dslopes if wants_slopes else query.new_empty(0),
    ]
    return tuple(grad.contiguous() for grad in grads)


@streaming_backward.register_fake
def _(grad_out, query, key, value, out, saved, *rest):
    _, bias, slopes = rest[:3]
    wants_bias, wants_slopes = rest[7:9]
    return tuple(
        like.new_empty(like.shape if wanted else (0,))
        for like, wanted in (
            (query, True),
            (key, True),
            (value, True),
            (bias if wants_bias else query, wants_bias),
            (slopes if wants_slopes else query, wants_slopes),
        )
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:10])
    ctx.facts = inputs[10:]
    ctx.variant = _variant_of(inputs[10])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * (len(ctx.facts) + 4)
    if grad_out is None:
        return (None,) * 6 + nothing
    needs = ctx.needs_input_grad
    facts = ctx.facts
    if _variant_of(facts[0]) is not ctx.variant:
        # the name went to another variant since
        facts = (_key_of(ctx.variant), *facts[1:])
    operator = _Backward.apply if transformed() else streaming_backward
    dq, dk, dv, dbias, dslopes = operator(grad_out, *ctx.saved_tensors, needs[4], needs[5], *facts)
    grads = dq, dk, dv, None, dbias, dslopes
    return (
        *(grad if need else None for grad, need in zip(grads, needs[:6], strict=True)),
        *nothing,
    )


streaming_forward.register_autograd(_differentiate, setup_context=_setup)


def _no_second(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "impl='triton' has gradients of first order only; use impl='reference' to differentiate "
        "twice, or impl='chunked' to do so in O(tokens) memory."
    )


streaming_backward.register_autograd(_no_second)


def for_functorch(
    forward_op: Any, backward_op: Any, setup: Any, differentiate: Any
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """Two operators as functions for torch.func, which differentiates no custom operator.

    Args:
        forward_op: gives the output, and what is saved for the backward.
        backward_op: gives the gradients.
        setup: of the forward's context, as `register_autograd` takes it.
        differentiate: its backward, likewise.
    """

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            setup(ctx, inputs, output)

        backward = staticmethod(differentiate)

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return backward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        backward = staticmethod(_no_second)

    return Forward, Backward


_Forward, _Backward = for_functorch(streaming_forward, streaming_backward, _setup, _differentiate)
