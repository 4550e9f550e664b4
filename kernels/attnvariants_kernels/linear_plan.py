"""What the linear template launches, and in which block configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnvariants_kernels import linear_kernels as kernels
from attnvariants_kernels._triton import INTERPRETED, triton
from attnvariants_kernels.launch import Config, Launch, run_first
from attnvariants_kernels.streaming import architecture_of


class Call(NamedTuple):
    """Everything of a call but its tensors.

    Attributes:
        causal: query i sees keys j <= i + offset only.
        offset: bottom-right alignment is kv_len - q_len, which packed sequences take each by
            itself.
        eps: what the norm is clamped to from below.
        scale: multiplies the products.
        key_mask: bool or uint8 `[batch, kv_len]`, nonzero = visible; not with packed sequences.
        cu_q: int32 `[sequences + 1]`, boundaries of sequences packed into batch 1.
        cu_k: likewise for the keys.
        max_q: length of the longest packed query sequence.
        max_k: likewise for the keys.
        precision: of float32 products, "ieee" or "tf32".
    """

    causal: bool
    offset: int
    eps: float
    scale: float
    key_mask: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int | None = None
    max_k: int | None = None
    precision: str = "ieee"


class State(NamedTuple):
    """What all keys so far leave behind, one of each per sequence, float32.

    Attributes:
        memory: sum_j k_j v_j^T, `[batch, kv_heads, features, value_dim]`.
        total: sum_j k_j, `[batch, kv_heads, features]`.
    """

    memory: Tensor
    total: Tensor


class Step(NamedTuple):
    """A kernel of a call, still to be given a configuration."""

    make: Callable[[Config], Launch]
    configs: tuple[Config, ...]
    key: tuple[Any, ...]


class _Carried(NamedTuple):
    """States of [batch, kv_heads, slots], one per full chunk, and how to find one."""

    state: Tensor
    sums: Tensor
    slots: int
    skip: int
    chunk: int
    cu: Tensor | None
    sequences: int


# the first configuration that fitted, by all that decides it
_fitting: dict[tuple[Any, ...], int] = {}


def run(steps: dict[str, Step]) -> None:
    """Launch them in order, each in the first of its configurations that fits."""
    for step in steps.values():
        first = _fitting.get(step.key, 0)
        used = run_first(lambda config, step=step: [step.make(config)], step.configs[first:])
        if not INTERPRETED:
            _fitting[step.key] = max(first, step.configs.index(used))


def forward_steps(q, k, v, out, norm, state, call, architecture=None) -> dict[str, Step]:
    """The kernels of a forward call, which write to out, norm and, unless None, state."""
    carried = _carry(q, k, v, call)
    architecture = architecture or architecture_of(q.device)
    return {
        "state": _state_step(k, v, carried, call, architecture, last=state),
        "forward": _read_step("out", q, k, v, carried, out, call, architecture, norm=norm),
    }


def backward_steps(
    grad_out, q, k, v, out, norm, dq, dk, dv, call, architecture=None
) -> dict[str, Step]:
    """The kernels of a backward call, which write to dq, dk and dv."""
    g = torch.empty(
        out.shape,
        dtype=torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32,
        device=out.device,
    )
    delta = torch.empty_like(norm)
    architecture = architecture or architecture_of(q.device)
    ahead, behind = _carry(q, k, v, call), _carry(q, k, v, call, reverse=True)

    def read(kind, a, b, e, carried, grad):
        return _read_step(kind, a, b, e, carried, grad, call, architecture, delta=delta)

    return {
        "delta": _delta_step(grad_out, out, norm, g, delta, call),
        "state": _state_step(k, v, ahead, call, architecture),
        "dq": read("dq", g, v, k, ahead, dq),
        "state_reverse": _state_step(q, g, behind, call, architecture, delta=delta),
        "dk": read("dk", v, g, q, behind, dk),
        "dv": read("dv", k, q, g, behind, dv),
    }


def _carry(q: Tensor, k: Tensor, v: Tensor, call: Call, reverse: bool = False) -> _Carried:
    """Room for the states of keys and values, or of queries and gradients if `reverse`."""
    chunk = _chunk(k.shape[3])
    cu = call.cu_q if reverse else call.cu_k
    tokens = (q if reverse else k).shape[2]
    sequences = len(cu) - 1 if cu is not None else k.shape[0]
    slots = tokens // chunk if call.causal or cu is not None else 1
    skip = 0
    if call.causal and cu is None and not reverse:
        # the first query after a long prefix reads the state just before it, none reads another
        skip = max(0, min((call.offset + 1) // chunk, slots) - 1)
    slots -= skip
    place = (k.shape[0], k.shape[1], slots, k.shape[3])
    dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    state = torch.empty((*place, v.shape[3]), dtype=dtype, device=k.device)
    sums = torch.empty(place, dtype=torch.float32, device=k.device)
    return _Carried(state, sums, slots, skip, chunk, cu, sequences)


def _state_step(x, y, carried, call, architecture, delta=None, last=None) -> Step:
    kv_heads = carried.state.shape[1]
    reverse, mask = delta is not None, call.key_mask
    width_x, width_y = x.shape[3], y.shape[3]
    needed = carried.slots > 0 or last is not None
    block_x, block_y = (min(32 if INTERPRETED else 64, _padded(w)) for w in (width_x, width_y))

    def make(config: Config) -> Launch:
        blocks = _cdiv(width_x, block_x) * _cdiv(width_y, block_y)
        arguments = {
            "x_ptr": x,
            "y_ptr": y,
            "weight_ptr": delta,
            "mask_ptr": None if reverse else _bytes(mask),
            "state_ptr": carried.state,
            "sum_ptr": carried.sums,
            "last_ptr": last and last.memory,
            "last_sum_ptr": last and last.total,
            "cu_ptr": carried.cu,
            "x_strides": x.stride()[:3],
            "y_strides": y.stride()[:3],
            "mask_strides": _mask_strides(mask),
            "heads": kv_heads,
            "length": x.shape[2],
            "slots": carried.slots,
            "skip": carried.skip,
            "total": x.shape[2],
        }
        constants = {
            "WIDTH_X": width_x,
            "WIDTH_Y": width_y,
            "BLOCK_X": block_x,
            "BLOCK_Y": block_y,
            "BLOCK_T": config.block_n,
            "CHUNK": carried.chunk,
            "GROUP": x.shape[1] // kv_heads if reverse else 1,
            "CAUSAL": call.causal,
            "REVERSE": reverse,
            "PRECISION": _precision(x, call),
        }
        grid = (needed * blocks * kv_heads * carried.sequences,)
        return Launch(kernels.state_kernel, grid, arguments, constants, config)

    configs = _configs("state", x, y, call, architecture)
    return Step(make, configs, ("state", architecture, x.dtype, y.dtype, width_x, width_y))


def _read_step(kind, a, b, e, carried, out, call, architecture, delta=None, norm=None) -> Step:
    reverse, mask = kind in ("dk", "dv"), call.key_mask
    cu_rows, cu_columns, longest = call.cu_q, call.cu_k, call.max_q
    if reverse:
        cu_rows, cu_columns, longest = call.cu_k, call.cu_q, call.max_k
    longest = a.shape[2] if cu_rows is None else longest
    width_a, width_e = a.shape[3], e.shape[3]
    blocks = _blocks(a, e, call)
    rows_of_norm = norm if delta is None else delta

    def make(config: Config) -> Launch:
        tiles = _cdiv(longest, config.block_m)
        arguments = {
            "a_ptr": a,
            "b_ptr": b,
            "e_ptr": e,
            "state_ptr": carried.state,
            "sum_ptr": carried.sums,
            "delta_ptr": delta,
            "mask_ptr": _bytes(mask),
            "out_ptr": out,
            "norm_ptr": norm,
            "cu_rows_ptr": cu_rows,
            "cu_columns_ptr": cu_columns,
            "a_strides": a.stride()[:3],
            "b_strides": b.stride()[:3],
            "e_strides": e.stride()[:3],
            "mask_strides": _mask_strides(mask),
            "out_strides": out.stride()[:3],
            "heads": a.shape[1],
            "rows": a.shape[2],
            "columns": b.shape[2],
            "offset": call.offset,
            "slots": carried.slots,
            "skip": carried.skip,
            "tiles": tiles,
            "total": rows_of_norm.shape[2],
            "scale": float(call.scale),
            "eps": float(call.eps),
        }
        constants = {
            "KIND": kind,
            "WIDTH_A": width_a,
            "WIDTH_E": width_e,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_A": blocks.a,
            "BLOCK_E": blocks.e,
            "WHOLE_A": blocks.whole_a,
            "CHUNK": carried.chunk,
            "GROUP": max(a.shape[1], b.shape[1]) // carried.state.shape[1],
            "CAUSAL": call.causal,
            "PRECISION": _precision(out, call),
        }
        grid = (_cdiv(width_e, blocks.e) * tiles * a.shape[1] * carried.sequences,)
        return Launch(kernels.read_kernel, grid, arguments, constants, config)

    configs = _configs(kind, a, e, call, architecture)
    return Step(make, configs, (kind, architecture, a.dtype, e.dtype, width_a, width_e))


def _delta_step(grad_out, out, norm, g, delta, call) -> Step:
    def make(config: Config) -> Launch:
        tiles = _cdiv(out.shape[2], config.block_m)
        arguments = {
            "grad_ptr": grad_out,
            "out_ptr": out,
            "norm_ptr": norm,
            "scaled_ptr": g,
            "delta_ptr": delta,
            "grad_strides": grad_out.stride()[:3],
            "out_strides": out.stride()[:3],
            "heads": out.shape[1],
            "rows": out.shape[2],
            "tiles": tiles,
            "eps": float(call.eps),
        }
        constants = {
            "WIDTH": out.shape[3],
            "BLOCK_M": config.block_m,
            "BLOCK_WIDTH": _padded(out.shape[3]),
        }
        grid = (tiles * out.shape[0] * out.shape[1],)
        return Launch(kernels.delta_kernel, grid, arguments, constants, config)

    return Step(make, (Config(16, 16, 4, 1),), ("delta",))


class _Blocks(NamedTuple):
    """How `read_kernel` cuts widths: a's beside states, e's, and a's beside columns, 0 if cut."""

    a: int
    e: int
    whole_a: int


def _blocks(a: Tensor, e: Tensor, call: Call) -> _Blocks:
    single = a.dtype == e.dtype == torch.float32
    width_a, width_e = _padded(a.shape[3]), _padded(e.shape[3])
    whole_a = 0 if single else width_a
    if INTERPRETED:
        return _Blocks(16, 32, whole_a)
    block_a = 32 if single and call.precision == "ieee" else 64
    return _Blocks(min(block_a, width_a), min(128, width_e), whole_a)


def _configs(
    kernel: str, a: Tensor, e: Tensor, call: Call, architecture: str
) -> tuple[Config, ...]:
    """Configurations to try in turn, each needing less shared memory than the last.

    Features are wide and tiles of float32 take two 16-bit ones, so few keys fit beside them; Ampere
    has registers for 64 rows and the accumulator.
    """
    if INTERPRETED:
        return (Config(32, 16, 1, 1),)
    single = a.dtype == e.dtype == torch.float32
    if kernel == "state":
        return Config(64, 32 if single else 64, 4, 2 if single else 3), Config(64, 32, 4, 1)
    half = torch.float16 in (a.dtype, e.dtype)
    if single and call.precision == "ieee":
        best = Config(64, 64, 8, 2)
    elif single or a.shape[3] > 256 or (half and architecture != "sm_90"):
        best = Config(64, 32, 8, 2)
    elif architecture == "gfx942":
        best = Config(128, 32, 8, 2)
    elif architecture == "sm_80":
        best = Config(64, 64, 8, 2)
    else:
        best = Config(128, 64, 8, 2)
    return best, Config(64, 32, 4, 1), Config(16, 16, 4, 1)


def _chunk(features: int) -> int:
    """Tokens from one carried state to the next."""
    if INTERPRETED:
        return 32
    return 128 if features <= 128 else 256


def _precision(x: Tensor, call: Call) -> str:
    """Of products of float32 operands, which float16 and bfloat16 calls have too, or could."""
    return call.precision if x.dtype == torch.float32 else "tf32"


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else tuple(mask.stride())
