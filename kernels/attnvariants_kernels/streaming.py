"""Launching the streaming template: any variant's hooks, any call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants_kernels import backward as kernels_backward
from attnvariants_kernels import forward as kernels_forward
from attnvariants_kernels import threshold_plan, tuning
from attnvariants_kernels._triton import INTERPRETED, triton
from attnvariants_kernels.hooks import Hooks
from attnvariants_kernels.launch import Config, Launch, addressable, run_first
from attnvariants_kernels.tiles import Dropout, Extra


class Call(NamedTuple):
    """All of a call but query, key and value.

    Attributes:
        scale: multiplier of q.k, > 0.
        softcap: cap of the scores, 0 for none.
        offset: row i stands at position i + offset among the keys; of packed calls it is ignored,
            each sequence being aligned bottom right.
        left: keys visible before the position; None for all.
        right: keys visible after it; None for all.
        mask: bool or uint8, [B, H, M, N], expanded as need be.
        bias: [B, H, M, N], expanded as need be.
        slopes: ALiBi slopes, [B or sequences, H], float32.
        visible: number of visible keys, [B, H, M] integers; None to count them by geometry.
        cu_q: int32 [sequences + 1] for packed calls, whose tensors have batch 1.
        cu_k: likewise for the keys.
        max_q: the most queries of a sequence.
        max_k: the most keys of a sequence.
        dropout_p: probability of dropping a weight; not for packed calls.
        seed: of the dropout.
        precision: "ieee" or "tf32", for float32.
        theta: the variant's runtime numbers.
    """

    scale: float
    softcap: float = 0.0
    offset: int = 0
    left: int | None = None
    right: int | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    visible: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    dropout_p: float = 0.0
    seed: int = 0
    precision: str = "ieee"
    theta: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Sizes:
    sequences: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    max_q: int
    max_k: int
    architecture: str


def architecture_of(device: torch.device) -> str:
    """The nearest of the architectures that configurations ship for."""
    if device.type != "cuda":
        return "sm_90"
    return _architecture(device.index or 0)


@lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(index)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def _sizes(q: Tensor, k: Tensor, v: Tensor, call: Call, architecture: str | None) -> _Sizes:
    packed = call.cu_q is not None
    return _Sizes(
        sequences=call.cu_q.shape[0] - 1 if call.cu_q is not None else q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        max_q=call.max_q if packed else q.shape[2],
        max_k=call.max_k if packed else k.shape[2],
        architecture=architecture or architecture_of(q.device),
    )


def _rows_strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()[:3])


def _extra(call: Call) -> Extra:
    """The kernels' view of the optional parts."""
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    by_key = mask is not None and (mask.stride(2) == 0 or mask.shape[2] == 1)
    key_mask, full = (mask, None) if by_key else (None, mask)
    dropout = None
    if call.dropout_p:
        kept = 1 - call.dropout_p
        factor = 1 / kept if kept > 0 else 0.0
        dropout = Dropout(int(call.dropout_p * 2**32), factor, call.seed)
    bias, slopes, visible = call.bias, call.slopes, call.visible
    return Extra(
        left=call.left,
        right=call.right,
        softcap=call.softcap or None,
        key_mask=key_mask,
        key_mask_strides=None
        if key_mask is None
        else (key_mask.stride(0), key_mask.stride(1), key_mask.stride(3)),
        mask=full,
        mask_strides=None if full is None else tuple(full.stride()),
        bias=bias,
        bias_strides=None if bias is None else tuple(bias.stride()),
        slopes=slopes,
        slopes_strides=None if slopes is None else tuple(slopes.stride()),
        visible=visible,
        visible_strides=None if visible is None else tuple(visible.stride()),
        cu_q=call.cu_q,
        cu_k=call.cu_k,
        dropout=dropout,
    )


def _constants(q: Tensor, v: Tensor, hooks: Hooks, call: Call, config: Config) -> dict[str, Any]:
    return {
        "OPS": hooks,
        "DIM": q.shape[3],
        "V_DIM": v.shape[3],
        "BLOCK_DIM": max(16, triton.next_power_of_2(q.shape[3])),
        "BLOCK_V": max(16, triton.next_power_of_2(v.shape[3])),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": call.precision if q.dtype == torch.float32 else "ieee",
    }


def _common(q: Tensor, k: Tensor, v: Tensor, call: Call, sizes: _Sizes) -> dict[str, Any]:
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "q_strides": _rows_strides(q),
        "k_strides": _rows_strides(k),
        "v_strides": _rows_strides(v),
        "extra": _extra(call),
        "theta": call.theta or (0.0,),
        "scale": float(call.scale),
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "M": sizes.q_len,
        "N": sizes.kv_len,
        "offset": call.offset,
        "total_q": sizes.q_len,
        "plane": q.shape[0] * sizes.heads * sizes.q_len,
    }


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Tensor, call: Call, hooks: Hooks,
    config: Config, architecture: str | None = None,
) -> Launch:  # fmt: skip
    """The forward's launch; tensors may be on the meta device."""
    sizes = _sizes(q, k, v, call, architecture)
    blocks = _blocks(sizes.max_q, config.block_m)
    arguments = {
        **_common(q, k, v, call, sizes),
        "out_ptr": out,
        "saved_ptr": saved,
        "out_strides": _rows_strides(out),
    }
    grid = (blocks, sizes.heads, sizes.sequences)
    constants = _constants(q, v, hooks, call, config)
    return Launch(kernels_forward.forward_kernel, grid, arguments, constants, config)


def solver_configs(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Config, ...]:
    """The configurations of the solver of thresholds to try, the best first."""
    sizes = _sizes(q, k, v, call, None)
    width = max(q.shape[3], v.shape[3])
    return threshold_plan.configs(width, q.element_size(), sizes.max_q, sizes.max_k)


def plan_solve(
    q: Tensor, k: Tensor, v: Tensor, saved: Tensor, call: Call, hooks: Hooks, config: Config,
    sweeps: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that finds the thresholds, if `hooks.listed`; see `threshold_plan.plan_solve`."""
    sizes = _sizes(q, k, v, call, None)
    common = _common(q, k, v, call, sizes)
    constants = _constants(q, v, hooks, call, config)
    wide = solver_configs(q, k, v, call)[0].block_n
    return threshold_plan.plan_solve(
        common, constants, saved, sizes.max_q, sizes.max_k, wide, config, sweeps
    )


def with_lists(
    kernel: str, launch: Launch, v: Tensor, saved: Tensor, call: Call, hooks: Hooks
) -> list[Launch]:
    """The launches of a kernel: itself, after its lists of tiles if `hooks.listed`."""
    if not hooks.listed:
        return [launch]
    q, k = launch.arguments["q_ptr"], launch.arguments["k_ptr"]
    sizes = _sizes(q, k, v, call, None)
    best = solver_configs(q, k, v, call)[0]
    return threshold_plan.plan_lists(
        launch, saved, sizes.max_q, sizes.max_k, kernel == "dkv", (best.block_m, best.block_n)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, hooks: Hooks) -> tuple[Tensor, Tensor]:
    """Output [B, H, M, value_dim] in value's dtype, and the saved rows [saves, B, H, M], float32.

    Args:
        q: [B, H, M, head_dim], any strides.
        k: [B, kv_heads, N, head_dim].
        v: [B, kv_heads, N, value_dim].
        call: the rest of the call.
        hooks: the variant.
    """
    q, k, v = addressable(q), addressable(k), addressable(v)
    sizes = _sizes(q, k, v, call, None)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    saved = torch.empty(hooks.saves, *q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        if hooks.listed:
            run_first(
                lambda config: [plan_solve(q, k, v, saved, call, hooks, config)],
                solver_configs(q, k, v, call),
            )

        def plan(config: Config) -> list[Launch]:
            launch = plan_forward(q, k, v, out, saved, call, hooks, config)
            return with_lists("forward", launch, v, saved, call, hooks)

        _run("forward", sizes, q, v, hooks, plan)
    return out, saved


class Grads(NamedTuple):
    """Where the backward writes; `delta` is [1 or 2, B, H, M], `bias` and `slopes` may be None."""

    delta: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    bias: Tensor | None
    slopes: Tensor | None


def plan_backward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Tensor, grad_out: Tensor,
    grads: Grads, call: Call, hooks: Hooks, config: Config, architecture: str | None = None,
) -> Launch:  # fmt: skip
    """The launch of "delta", "dq" or "dkv"; tensors may be on the meta device."""
    sizes = _sizes(q, k, v, call, architecture)
    by_key = kernel == "dkv"
    blocks = _blocks(sizes.max_k if by_key else sizes.max_q, config[1 if by_key else 0])
    arguments = {
        **_common(q, k, v, call, sizes),
        "grad_ptr": grad_out,
        "grad_strides": _rows_strides(grad_out),
        "saved_ptr": saved,
        "delta_ptr": grads.delta,
    }
    if kernel == "delta":
        arguments |= {"out_ptr": out, "out_strides": _rows_strides(out)}
        function = kernels_backward.delta_kernel
    elif kernel == "dq":
        arguments |= {
            "dq_ptr": grads.dq,
            "dq_strides": _rows_strides(grads.dq),
            "dbias_ptr": grads.bias,
            "dslopes_ptr": grads.slopes,
        }
        function = kernels_backward.dq_kernel
    else:
        arguments |= {
            "dk_ptr": grads.dk,
            "dv_ptr": grads.dv,
            "dk_strides": _rows_strides(grads.dk),
            "dv_strides": _rows_strides(grads.dv),
        }
        function = kernels_backward.dkv_kernel
    heads = sizes.kv_heads if by_key else sizes.heads
    grid = (blocks, heads, sizes.sequences)
    constants = _constants(q, v, hooks, call, config)
    return Launch(function, grid, arguments, constants, config)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Tensor, call: Call,
    hooks: Hooks, wants_bias: bool = False, wants_slopes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key and value, and where wanted of bias and slopes.

    Those of bias, [B, H, M, N], and slopes, [B, H, M], are float32 and not yet summed over what
    was broadcast: a sum in a fixed order is the caller's. No atomics: two runs are bitwise equal.
    """
    q, k, v = addressable(q), addressable(k), addressable(v)
    out, grad_out = addressable(out), addressable(grad_out)
    # its planes are found by their size alone
    saved = saved.contiguous()
    sizes = _sizes(q, k, v, call, None)
    shape = q.shape[:3]

    def rows(*leading: int) -> Tensor:
        return torch.empty(*leading, *shape, dtype=torch.float32, device=q.device)

    bias = None
    if wants_bias:
        # tiles that no row sees are never written
        bias = torch.zeros(*shape, k.shape[2], dtype=torch.float32, device=q.device)
    grads = Grads(
        delta=rows(1 + hooks.delta_sweep),
        dq=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        dk=torch.empty(k.shape, dtype=k.dtype, device=k.device),
        dv=torch.empty(v.shape, dtype=v.dtype, device=v.device),
        bias=bias,
        slopes=rows() if wants_slopes else None,
    )
    needed = ["delta"] if hooks.needs_delta and out.numel() else []
    needed += ["dq"] if grads.dq.numel() else []
    needed += ["dkv"] if k.numel() + v.numel() else []
    for kernel in needed:

        def plan(config: Config, kernel: str = kernel) -> list[Launch]:
            launch = plan_backward(
                kernel, q, k, v, out, saved, grad_out, grads, call, hooks, config
            )
            return with_lists(kernel, launch, v, saved, call, hooks)

        _run(kernel, sizes, q, v, hooks, plan)
    return grads.dq, grads.dk, grads.dv, grads.bias, grads.slopes


def configs(
    kernel: str, architecture: str, q: Tensor, v: Tensor, hooks: Hooks, rows: int, keys: int
) -> tuple[Config, ...]:
    """The configurations to try for a kernel, the best first."""
    width = max(q.shape[3], v.shape[3])
    size = q.element_size()
    return tuning.configs(kernel, architecture, width, size, rows, keys, _cost(hooks, q))


def _cost(hooks: Hooks, q: Tensor) -> int:
    """What float16 keeps of each row, see `tiles.add_product`, comes on top of the variant's."""
    return min(hooks.cost + (q.dtype == torch.float16), max(tuning.COSTS))


# the first configuration that fitted, by all that decides it
_fitting: dict[Any, int] = {}


def _run(
    kernel: str, sizes: _Sizes, q: Tensor, v: Tensor, hooks: Hooks,
    plan: Callable[[Config], Sequence[Launch]],
) -> None:  # fmt: skip
    about = kernel, sizes.architecture, max(q.shape[3], v.shape[3])
    lengths = sizes.max_q, sizes.max_k
    candidates = configs(kernel, sizes.architecture, q, v, hooks, *lengths)
    if tuning.autotunes() and not INTERPRETED:
        cost = _cost(hooks, q)
        kind = tuning.kind_of(*about, q.dtype, *lengths, cost)
        others = tuning.alternatives(*about, q.element_size(), *lengths, cost)
        best = tuning.choose(kind, others, plan)
        candidates = tuple(dict.fromkeys([best, *candidates]))
    key = candidates, hooks
    first = _fitting.get(key, 0)
    used = run_first(plan, candidates[first:])
    if not INTERPRETED:
        _fitting[key] = max(first, candidates.index(used))
