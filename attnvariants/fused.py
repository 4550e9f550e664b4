"""The Triton engine: from a prepared call to the kernels, and why a call cannot go there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnvariants.problem import Problem, with_positive_scale
from attnvariants.registry import Variant, get_variant

_DTYPES = torch.float16, torch.bfloat16, torch.float32
_WIDEST = 256
_WIDEST_LINEAR = 512
# grids of the streaming kernels have at most so many programs along their second and third axis
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
    linear = takes_linear(problem)
    reasons = []
    if missing := _triton.why_not():
        reasons.append(missing)
    if variant.hooks is None and not linear:
        name = f"variant {variant.name!r}" if variant.name else "this variant"
        reasons.append(f"{name} has no kernels, which its `hooks` would give it")
    device = query.device.type
    if device != "cuda" and not (device == "cpu" and _triton.INTERPRETED):
        reasons.append(
            f"query is on {device}, needs cuda (or TRITON_INTERPRET=1 in the environment from the "
            "start, to interpret the kernels on the CPU)"
        )
    if query.dtype not in _DTYPES:
        reasons.append(f"dtype {query.dtype} is not float16, bfloat16 or float32")
    reasons += _too_wide(query.shape[-1], problem)
    if value.shape[-1] > _WIDEST:
        reasons.append(f"value's head_dim {value.shape[-1]} is over {_WIDEST}")
    if not linear and max(query.shape[:2]) > _GRID:
        reasons.append(f"batch or heads {list(query.shape[:2])} is over {_GRID}")
    for name in problem.learned:
        if variant.hooks is not None and not variant.options[name].in_prepare:
            reasons.append(f"{name} is a tensor, and the kernels take it as a number")
    if problem.packed is not None and problem.packed.cu_q.shape[0] > _GRID:
        reasons.append(f"there are more than {_GRID - 1} packed sequences")
    if problem.packed is not None and problem.dropout is not None:
        reasons.append("packed sequences take no dropout")
    if problem.position is not None and problem.options.get("length") == "kv":
        reasons.append("length='kv' counts the keys that are not empty slots, which are not read")
    if problem.packed is not None and problem.options.get("length") == "kv":
        reasons.append("length='kv' divides each packed sequence by its own length")
    return reasons


def _too_wide(head_dim: int, problem: Problem) -> list[str]:
    width, widest, hint = problem.variant.width_factor * head_dim, _WIDEST, ""
    if problem.variant.linear_eps is not None:
        widest = _WIDEST_LINEAR
        if more := beyond_linear(problem):
            widest = _WIDEST
            hint = f", and the linear kernels, which take {_WIDEST_LINEAR}, have no "
            hint += " and no ".join(more)
    if width <= widest:
        return []
    makes = f"makes {width} features," if width != head_dim else "is"
    return [f"head_dim {head_dim} {makes} over {widest}{hint}"]


def beyond_linear(problem: Problem) -> list[str]:
    """What a call has that the linear kernels do not, whatever its variant."""
    geometry, keep = problem.geometry, problem.keep
    given = {
        "window": geometry.left is not None or geometry.right not in (None, 0),
        "mask of single rows or heads": keep is not None
        and (keep.shape[1] != 1 or keep.shape[2] != 1),
        "bias": problem.bias is not None,
        "alibi_slopes": problem.slopes is not None,
        "softcap": bool(problem.softcap),
        "dropout": problem.dropout is not None,
    }
    return [name for name, there in given.items() if there]


def takes_linear(problem: Problem) -> bool:
    """Whether the linear kernels run a call, and not the streaming ones."""
    return problem.variant.linear_eps is not None and not beyond_linear(problem)


def attention(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """The output of a prepared call, differentiable."""
    from attnvariants import linear_ops, ops

    query, problem = with_positive_scale(query, problem)
    operator = linear_ops.linear if takes_linear(problem) else ops.streaming
    return operator(query, key, value, problem)


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
        `Launch`es: "forward", "delta" where it is needed, "dq" and "dkv"; before these, of a
        variant whose tiles are listed, "threshold" and "forward_tiles" and so on. Of a variant with
        `linear_eps` the linear kernels', "forward_state", "forward_read" and, where a state is to
        be decoded from, "forward_prefill", then "linear_delta", "linear_state", "linear_dq",
        "linear_state_reverse", "linear_dk" and "linear_dv"; and, for all calls that these do not
        take, the streaming ones as "forward_streaming", "streaming_delta" and so on.
    """
    variant = get_variant(variant)
    full = variant.resolve(options or {})
    scale = head_dim**-0.5 if variant.scale is None else variant.scale
    width = variant.width_factor * head_dim
    linear = variant.linear_eps is not None

    def meta(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    rows, keys = (4, heads, tokens), (4, kv_heads, tokens)
    tensors = meta(*rows, width), meta(*keys, width), meta(*keys, head_dim), meta(*rows, head_dim)
    launches = _shipped_linear(*tensors, variant, target, scale, causal) if linear else {}
    if variant.hooks is None or width > _WIDEST:
        return launches
    case = case_of(dtype, head_dim, tokens, scale, False)
    theta = theta_of(variant, full, case)
    hooks = hooks_of(variant, full, case)
    streaming = _shipped_streaming(*tensors, hooks, target, scale, causal, theta)
    if not linear:
        return streaming
    names = {name: f"streaming_{name}" for name in streaming} | {"forward": "forward_streaming"}
    return launches | {names[name]: launch for name, launch in streaming.items()}


def _shipped_streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    hooks: Any,
    target: str,
    scale: float,
    causal: bool,
    theta: tuple[float, ...],
) -> dict[str, Any]:
    from attnvariants_kernels import streaming

    rows, tokens = out.shape[:3], k.shape[2]
    saved = out.new_empty(hooks.saves, *rows, dtype=torch.float32)
    delta = out.new_empty(1 + hooks.delta_sweep, *rows, dtype=torch.float32)
    grads = streaming.Grads(delta, q, k, v, None, None)
    call = streaming.Call(scale=scale, right=0 if causal else None, theta=theta)

    def config(kernel: str) -> Any:
        return streaming.configs(kernel, target, q, v, hooks, tokens, tokens)[0]

    launches: dict[str, Any] = {}
    if hooks.listed:
        best = streaming.solver_configs(q, k, v, call)[0]
        launches["threshold"] = streaming.plan_solve(q, k, v, saved, call, hooks, best)

    def add(kernel: str, launch: Any) -> None:
        *lists, launch = streaming.with_lists(kernel, launch, v, saved, call, hooks)
        launches.update({f"{kernel}_tiles": tiles for tiles in lists} | {kernel: launch})

    add(
        "forward",
        streaming.plan_forward(q, k, v, out, saved, call, hooks, config("forward"), target),
    )
    for kernel in ("delta", "dq", "dkv") if hooks.needs_delta else ("dq", "dkv"):
        add(
            kernel,
            streaming.plan_backward(
                kernel, q, k, v, out, saved, out, grads, call, hooks, config(kernel), target
            ),
        )
    return launches


def _shipped_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    variant: Variant,
    target: str,
    scale: float,
    causal: bool,
) -> dict[str, Any]:
    from attnvariants_kernels import linear

    call = {
        "causal": causal,
        "offset": 0,
        "eps": variant.linear_eps,
        "scale": scale,
        "architecture": target,
    }
    forward = linear.plan_forward(q, k, v, **call)
    launches = {"forward_state": forward["state"], "forward_read": forward["forward"]}
    if causal:
        prefill = linear.plan_forward(q, k, v, return_state=True, **call)
        launches["forward_prefill"] = prefill["state"]
    norm = out.new_empty(out.shape[:3], dtype=torch.float32)
    backward = linear.plan_backward(out, q, k, v, out, norm, **call)
    return launches | {f"linear_{name}": launch for name, launch in backward.items()}
