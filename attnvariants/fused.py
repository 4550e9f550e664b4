"""The Triton engine: from a prepared call to the kernels, and why a call cannot go there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnvariants.problem import Problem
from attnvariants.registry import Variant, get_variant

_DTYPES = torch.float16, torch.bfloat16, torch.float32
_WIDEST = 256
# grids have at most so many programs along their second and third axis
_GRID = 65535


def hooks_of(variant: Variant, options: Mapping[str, Any], case: Any) -> Any:
    """The hooks of a variant under these options in this `attnvariants_kernels.hooks.Case`."""
    return variant.hooks(options, case) if _picks(variant) else variant.hooks


def theta_of(variant: Variant, options: Mapping[str, Any], case: Any) -> tuple[float, ...]:
    """The hooks' runtime numbers."""
    return () if variant.theta is None else variant.theta(options, case)


def _picks(variant: Variant) -> bool:
    # Hooks is a tuple of functions, not a function
    return callable(variant.hooks)


def case_of(dtype: torch.dtype, head_dim: int, kv_len: int, scale: float, shaped: bool) -> Any:
    """The `Case` that hooks and their numbers are chosen by."""
    from attnvariants_kernels.hooks import Case

    return Case(str(dtype).removeprefix("torch."), head_dim, kv_len, scale, shaped)


def why_not(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> list[str]:
    """Every reason why the kernels cannot run a call; empty if they can."""
    from attnvariants_kernels import _triton

    variant = problem.variant
    reasons = []
    if missing := _triton.why_not():
        reasons.append(missing)
    if variant.hooks is None:
        name = repr(variant.name) if variant.name else "this variant"
        reasons.append(f"variant {name} has no kernels, which its `hooks` would give it")
    device = query.device.type
    if device != "cuda" and not (device == "cpu" and _triton.INTERPRETED):
        reasons.append(
            f"query is on {device}, needs cuda (or TRITON_INTERPRET=1 in the environment from the "
            "start, to interpret the kernels on the CPU)"
        )
    if query.dtype not in _DTYPES:
        reasons.append(f"dtype {query.dtype} is not float16, bfloat16 or float32")
    width = 2 * query.shape[-1] if variant.name == "cosformer" else query.shape[-1]
    if width > _WIDEST:
        of = " features (twice the head_dim)" if width != query.shape[-1] else ""
        reasons.append(f"head_dim {width}{of} is over {_WIDEST}")
    if value.shape[-1] > _WIDEST:
        reasons.append(f"value's head_dim {value.shape[-1]} is over {_WIDEST}")
    if max(query.shape[:2]) > _GRID:
        reasons.append(f"batch or heads {list(query.shape[:2])} is over {_GRID}")
    if problem.packed is not None and problem.dropout is not None:
        reasons.append("packed sequences take no dropout")
    if problem.packed is not None and problem.options.get("length") == "kv":
        reasons.append("length='kv' divides each packed sequence by its own length")
    return reasons


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call, differentiable."""
    from attnvariants import ops

    # the kernels' scores are a positive multiple of the products
    if problem.scale < 0:
        query, problem = -query, replace(problem, scale=-problem.scale)
    elif problem.scale == 0:
        query, problem = query * 0, replace(problem, scale=1.0)
    return ops.streaming(query, key, value, problem)


def shipped(
    variant: str | Variant,
    options: Mapping[str, Any] | None = None,
    *,
    target: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    heads: int = 16,
    kv_heads: int = 16,
    tokens: int = 4096,
) -> dict[str, Any]:
    """The launches that a variant's call makes on a target, on meta tensors, by kernel name.

    Args:
        variant: name or Variant; one without kernels has no launches.
        options: the variant's own.
        target: "sm_80", "sm_90", "sm_100" or "gfx942".
        head_dim: of query, key and value.
        dtype: of query, key and value.
        causal: whether the future is hidden.
        heads: number of query heads.
        kv_heads: number of key heads.
        tokens: number of queries and of keys.

    Returns:
        `Launch`es: "forward", "delta" where it is needed, "dq" and "dkv".
    """
    from attnvariants_kernels import streaming

    variant = get_variant(variant)
    if variant.hooks is None:
        return {}
    full = variant.resolve(options or {})
    scale = head_dim**-0.5 if variant.scale is None else variant.scale
    case = case_of(dtype, head_dim, tokens, scale, False)
    hooks = hooks_of(variant, full, case)
    width = 2 * head_dim if variant.name == "cosformer" else head_dim

    def meta(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    rows = 4, heads, tokens
    q, k, v = meta(*rows, width), meta(4, kv_heads, tokens, width), meta(4, kv_heads, tokens, head_dim)
    out, saved = meta(*rows, head_dim), meta(hooks.saves, *rows, like=torch.float32)
    delta = meta(1 + hooks.delta_sweep, *rows, like=torch.float32)
    grads = streaming.Grads(delta, q, k, v, None, None)
    call = streaming.Call(
        scale=scale, right=0 if causal else None, theta=theta_of(variant, full, case)
    )

    def config(kernel: str) -> Any:
        return streaming.configs(kernel, target, q, v, hooks, tokens, tokens)[0]

    launches = {
        "forward": streaming.plan_forward(
            q, k, v, out, saved, call, hooks, config("forward"), target
        )
    }
    for kernel in ("delta", "dq", "dkv") if hooks.needs_delta else ("dq", "dkv"):
        launches[kernel] = streaming.plan_backward(
            kernel, q, k, v, out, saved, out, grads, call, hooks, config(kernel), target
        )
    return launches
