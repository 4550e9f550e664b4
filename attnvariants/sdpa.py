"""The engine of other people's softmax kernels: torch's scaled_dot_product_attention, flash-attn.

For variants whose weights are the plain softmax of the scores, once query and key are prepared.
flash-attn is used where it is installed and computes exactly what is asked for.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnvariants import chunked, context, second_order
from attnvariants.problem import Problem, compute_dtype, with_positive_scale

FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def why_not(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Everything that keeps a call from this engine, as clauses."""
    reasons = []
    if not problem.variant.softmax_scores:
        name = problem.variant.name or "the variant"
        reasons.append(f"{name} is not a softmax of its scores")
    if problem.packed is not None:
        reasons.append("packed sequences take one call each")
    if problem.dropout is not None:
        reasons.append("dropout_p would draw another mask than the other engines do")
    if problem.softcap and not _by_flash(query, key, value, problem):
        reasons.append("softcap has no place in scaled_dot_product_attention")
    return reasons


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call, `[batch, heads, q_len, value_dim]`.

    The kernels differentiate once; gradients to be differentiated again are the chunked engine's.
    """
    # torch's own hides with -inf before it multiplies
    query, problem = with_positive_scale(query, problem)
    inputs = query, key, value, problem.bias, problem.slopes
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not wanted or not context.plain():
        return _once(query, key, value, problem)
    grad_out: list[Tensor] = []
    query, key, value, bias, slopes = _Inputs.apply(grad_out, problem, *inputs)
    out = _once(query, key, value, replace(problem, bias=bias, slopes=slopes))
    # it comes before the kernels' gradients, which come to _Inputs
    out.register_hook(lambda grad: grad_out.__setitem__(slice(None), [grad]))
    return out


class _Inputs(torch.autograd.Function):
    """The inputs as they are; the way back puts differentiable gradients in the kernels' place."""

    @staticmethod
    def forward(ctx, grad_out, problem, query, key, value, bias, slopes):
        ctx.grad_out = grad_out
        ctx.bare, (keep, *_) = second_order.held(problem)
        ctx.names = list(problem.learned)
        inputs = query, key, value, bias, slopes
        ctx.save_for_backward(keep, *inputs, *problem.learned.values())
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx, *grads):
        kept = list(ctx.grad_out)
        ctx.grad_out.clear()
        if not kept or not torch.is_grad_enabled():
            return None, None, *grads
        keep, query, key, value, *rest = ctx.saved_tensors
        problem = second_order.whole(ctx.bare, ctx.names, (keep, *rest))
        needs = [*ctx.needs_input_grad[2:], *(False for _ in ctx.names)]
        again = second_order.differentiable(
            chunked.gradients, kept[0], query, key, value, problem, needs
        )
        return None, None, *again[:5]


def _once(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    if _by_flash(query, key, value, problem):
        return _flash(query.to(value.dtype), key.to(value.dtype), value, problem)
    if not key.shape[2]:
        # nothing to see: products over no keys are 0 and keep the graph
        rows = query.to(value.dtype).unflatten(1, (key.shape[1], -1))
        scores = rows @ key.to(value.dtype).unsqueeze(2).transpose(-1, -2)
        return (scores @ value.unsqueeze(2)).flatten(1, 2)
    mask, sighted, is_causal = _mask(problem)
    dtype = value.dtype
    # in half precision a bias of some size would be rounded by whole units
    biased = mask is not None and mask.is_floating_point()
    if biased or _overflows(query, dtype):
        dtype = compute_dtype(value)
    # a branch, because a comparison of symbolic sizes is no bool
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out = F.scaled_dot_product_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        attn_mask=None if mask is None else mask if mask.dtype == torch.bool else mask.to(dtype),
        is_causal=is_causal,
        scale=problem.scale,
        **grouped,
    ).to(value.dtype)
    return out if sighted is None else out.masked_fill(~sighted, 0.0)


def _overflows(query: Tensor, dtype: torch.dtype) -> bool:
    """Whether a prepared query, with its temperature, may be out of float16's range."""
    if dtype != torch.float16 or query.dtype == dtype or not query.numel():
        return False
    # where it cannot be read, it may
    return not context.readable(query) or bool(query.abs().amax() > torch.finfo(dtype).max)


def mask_size(problem: Problem) -> int:
    """Scores that a mask would have to be built for, beyond what the caller gave."""
    geometry = problem.geometry
    if (geometry.sees_all and problem.slopes is None) or _upper_left(problem):
        return 0
    return geometry.q_len * geometry.kv_len


def _upper_left(problem: Problem) -> bool:
    """Whether the call is what torch calls is_causal."""
    geometry = problem.geometry
    plain = problem.keep is None and problem.bias is None and problem.slopes is None
    causal = geometry.left is None and geometry.right == 0
    return plain and causal and geometry.offset == 0


def _mask(problem: Problem) -> tuple[Tensor | None, Tensor | None, bool]:
    """Mask (bool or float), rows that see something (None if all do), and torch's is_causal.

    Rows that see nothing are shown everything, since what backends make of them differs.
    """
    geometry, keep, bias = problem.geometry, problem.keep, problem.bias
    if _upper_left(problem):
        return None, None, True
    everything = slice(0, geometry.q_len), slice(0, geometry.kv_len)
    if not geometry.sees_all:
        inside = geometry.keep(*everything, problem.device)
        keep = inside if keep is None else keep & inside
    sighted = None
    if keep is not None and (problem.keep is not None or geometry.any_blind):
        sighted = keep.any(-1, keepdim=True)
        keep = keep | ~sighted
    if problem.slopes is not None:
        distance = geometry.distance(*everything, problem.device).abs()
        alibi = -problem.slopes[..., None, None] * distance
        bias = alibi if bias is None else bias + alibi
    if bias is None:
        return keep, sighted, False
    return bias if keep is None else bias.masked_fill(~keep, -torch.inf), sighted, False


def _by_flash(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> bool:
    """Whether flash-attn is there and computes this call exactly as asked."""
    geometry, slopes = problem.geometry, problem.slopes
    if query.device.type != "cuda" or value.dtype not in (torch.float16, torch.bfloat16):
        return False
    width = value.shape[3]
    return (
        problem.keep is None
        and problem.bias is None
        and problem.dropout is None
        and problem.packed is None
        and geometry.offset == geometry.kv_len - geometry.q_len
        and query.shape[3] == width <= 256
        and width % 8 == 0
        and geometry.kv_len > 0
        and geometry.q_len > 0
        and not (slopes is not None and slopes.requires_grad)
        and FLASH_ATTN
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    from flash_attn import flash_attn_func

    geometry = problem.geometry
    slopes = problem.slopes
    if slopes is not None and slopes.shape[0] == 1:
        slopes = slopes[0]
    left, right = (-1 if side is None else side for side in (geometry.left, geometry.right))
    out = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)),
        softmax_scale=problem.scale,
        causal=right == 0,
        window_size=(left, right),
        softcap=problem.softcap,
        alibi_slopes=slopes,
        deterministic=True,
    )
    return out.transpose(1, 2)
