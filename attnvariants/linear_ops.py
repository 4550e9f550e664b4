"""The linear-time kernels as two operators of torch: traceable, exportable, with gradients.

`attnvariants::linear_forward` and `attnvariants::linear_backward` run a variant with `linear_eps`:

    out_i = sum_{j visible} c_ij v_j / max(norm_i, eps),    c_ij = scale q_i . k_j
    norm_i = sum_{j visible} c_ij

from features q and k that the variant prepared. `fused.beyond_linear` says which calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants.context import transformed
from attnvariants.ops import _no_second, for_functorch
from attnvariants.problem import Problem


class _Facts(NamedTuple):
    """The end of both schemas: all of a call that is no tensor; packed lengths are of the longest.

    `scale` multiplies the products and `eps` is what their sum is clamped to from below.
    """

    scale: float
    eps: float
    causal: bool
    offset: int
    max_q: int
    max_k: int


_INPUTS = "Tensor query, Tensor key, Tensor value"
# the key mask broadcasts to [batch, kv_len]; boundaries are int32
_SHARED = (
    "Tensor? key_mask, Tensor? cu_q, Tensor? cu_k, float scale, float eps, bool causal, "
    "SymInt offset, SymInt max_q, SymInt max_k"
)
_FORWARD = f"({_INPUTS}, {_SHARED}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_out, {_INPUTS}, Tensor out, Tensor norm, {_SHARED}) -> (Tensor, Tensor, Tensor)"
)


def linear(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call by the linear kernels, differentiable.

    Args:
        query: as prepared; the kernels get query and key in value's dtype.
        key: likewise.
        value: `[batch, kv_heads, kv_len, value_dim]`.
        problem: the call, with nothing that is beyond the linear kernels.

    Returns:
        `[batch, heads, q_len, value_dim]` in value's dtype.
    """
    operator = _Forward.apply if transformed() else linear_forward
    out, _ = operator(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        None if problem.keep is None else problem.keep[:, 0, 0],
        problem.cu_q,
        problem.cu_k,
        *facts(problem),
    )
    return out


def facts(problem: Problem) -> _Facts:
    """What the operators need of a call besides tensors."""
    geometry, eps = problem.geometry, problem.variant.linear_eps
    assert eps is not None
    return _Facts(
        scale=problem.scale,
        eps=eps,
        causal=geometry.right is not None,
        offset=geometry.offset,
        max_q=geometry.q_len,
        max_k=geometry.kv_len,
    )


def kernel_call(
    key: Tensor, key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, *facts: Any
) -> dict[str, Any]:
    """The kernels' description of a call, from what the operators get after the tensors."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        **_Facts(*facts)._asdict(),
        "key_mask": None if key_mask is None else key_mask.expand(key.shape[0], key.shape[2]),
        "cu_q": cu_q,
        "cu_k": cu_k,
        "precision": "ieee" if exact else "tf32",
    }


@torch.library.custom_op("attnvariants::linear_forward", mutates_args=(), schema=_FORWARD)
def linear_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    """Output `[batch, heads, q_len, value_dim]` and norm `[batch, heads, q_len]`, float32."""
    from attnvariants_kernels import linear

    return linear.forward(query, key, value, **kernel_call(key, *rest))


@linear_forward.register_fake
def _(query, key, value, *rest):
    rows = query.shape[:3]
    return value.new_empty(*rows, value.shape[3]), query.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("attnvariants::linear_backward", mutates_args=(), schema=_BACKWARD)
def linear_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    *rest: Any,
) -> Any:
    """Gradients of query, key and value."""
    from attnvariants_kernels import linear

    return linear.backward(grad_out, query, key, value, out, norm, **kernel_call(key, *rest))


@linear_backward.register_fake
def _(grad_out, query, key, value, *rest):
    return tuple(like.new_empty(like.shape) for like in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.facts = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * (len(ctx.facts) + 3)
    if grad_out is None:
        return (None,) * 3 + nothing
    operator = _Backward.apply if transformed() else linear_backward
    grads = operator(grad_out, *ctx.saved_tensors, *ctx.facts)
    needs = ctx.needs_input_grad[:3]
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *nothing)


linear_forward.register_autograd(_differentiate, setup_context=_setup)
linear_backward.register_autograd(_no_second)


_Forward, _Backward = for_functorch(linear_forward, linear_backward, _setup, _differentiate)


def _mapped(operator: Any, count: int) -> Any:
    """A vmap rule: the mapped dimension joins the batch of the first `count` tensors."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if any(tensor is not None for tensor in args[count + 1 : count + 3]):
            raise ValueError("vmap cannot map packed sequences; pack the mapped ones too.")
        size = info.batch_size
        # all of these have a batch
        lifted = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(args[:count], in_dims, strict=False)
        ]
        batch = lifted[0].shape[1]
        mask, dim = args[count], in_dims[count]
        if mask is not None:
            # it may broadcast along the batch
            mask = mask.expand(size, *mask.shape) if dim is None else mask.movedim(dim, 0)
            mask = mask.expand(size, batch, -1).flatten(0, 1)
        results = operator(*(tensor.flatten(0, 1) for tensor in lifted), mask, *args[count + 1 :])
        return tuple(result.unflatten(0, (size, batch)) for result in results), (0,) * len(results)

    return rule


linear_forward.register_vmap(_mapped(linear_forward, 3))
linear_backward.register_vmap(_mapped(linear_backward, 6))
