"""An ordinary softmax flash forward in Triton, the yardstick of `bench.static` and `bench.gpu`.

Plain pointers, no hooks, no options: what one writes when softmax is all that is wanted.
"""

import torch

from attnvariants_kernels._triton import jit, tl, triton
from attnvariants_kernels.hooks import LOG2E
from attnvariants_kernels.launch import Config, Launch

# Few spills and few instructions a score element, by `bench.static`; only a GPU can say more.
CONFIGS = {
    "sm_80": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)},
    "sm_90": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
    "sm_100": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
}


@jit
def _tiles(q, k_ptr, v_ptr, low, high, acc, pivot, total, factor, keys, rows, n,
           stride_k, stride_v, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
           BLOCK_N: tl.constexpr, D: tl.constexpr):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D)
    # one 64-bit address a program and 32-bit offsets: half the registers of a tile of pointers
    in_k = columns[None, :] * stride_k + dims[:, None]
    in_v = columns[:, None] * stride_v + dims[None, :]
    for start in range(low, high, BLOCK_N):
        if EDGE:
            there = start + columns < n
            k = tl.load(k_ptr + in_k, mask=there[None, :], other=0.0)
            v = tl.load(v_ptr + in_v, mask=there[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + in_k)
            v = tl.load(v_ptr + in_v)
        s = tl.dot(q, k)
        if EDGE:
            keep = there[None, :]
            if CAUSAL:
                keep = keep & (start + columns[None, :] <= rows[:, None] + keys)
            s = tl.where(keep, s, float("-inf"))
        higher = tl.maximum(pivot, tl.max(s, 1) * factor)
        weights = tl.math.exp2(s * factor - higher[:, None])
        rescale = tl.math.exp2(pivot - higher)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc)
        pivot = higher
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    return acc, pivot, total, k_ptr, v_ptr


@jit(do_not_specialize=["group", "m", "n"])
def _softmax(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, factor, heads, group, m, n,
             stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
             stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
             CAUSAL: tl.constexpr, D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    q_ptr += batch * stride_qb + head * stride_qh + first.to(tl.int64) * stride_qm
    k_ptr += batch * stride_kb + (head // group) * stride_kh
    v_ptr += batch * stride_vb + (head // group) * stride_vh
    q = tl.load(
        q_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qm + dims[None, :],
        mask=rows[:, None] < m,
        other=0.0,
    )
    # a finite start, so that a row that sees nothing yet has no inf - inf
    pivot = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    keys = n - m
    high = n
    full = n
    if CAUSAL:
        high = tl.maximum(tl.minimum(n, first + BLOCK_M + keys), 0)
        full = tl.maximum(tl.minimum(n, first + 1 + keys), 0)
    full = full // BLOCK_N * BLOCK_N
    acc, pivot, total, k_ptr, v_ptr = _tiles(
        q, k_ptr, v_ptr, 0, full, acc, pivot, total, factor, keys, rows, n,
        stride_kn, stride_vn, False, CAUSAL, BLOCK_N, D)  # fmt: skip
    acc, pivot, total, k_ptr, v_ptr = _tiles(
        q, k_ptr, v_ptr, full, high, acc, pivot, total, factor, keys, rows, n,
        stride_kn, stride_vn, True, CAUSAL, BLOCK_N, D)  # fmt: skip
    seen = total > 0
    acc = acc * tl.where(seen, 1 / total, 0.0)[:, None]
    lse = tl.where(seen, pivot + tl.math.log2(total), float("-inf"))
    out_ptr += batch * stride_ob + head * stride_oh + first.to(tl.int64) * stride_om
    tl.store(
        out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_om + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=rows[:, None] < m,
    )
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * m + rows, lse, mask=rows < m)


def plan(q, k, v, out, lse, *, causal, scale=None, config):
    """The launch of softmax attention, causal bottom-right or full.

    Args:
        q: `[batch, heads, m, d]`, d a power of two, contiguous in d; may be on the meta device.
        k: `[batch, kv_heads, n, d]`.
        v: as k.
        out: as q.
        lse: `[batch, heads, m]`, float32, base 2.
        causal: whether query i sees keys up to i + n - m.
        scale: 1/sqrt(d) if None.
        config: the blocks.
    """
    batch, heads, m, d = q.shape
    config = Config(*config)
    strides = {
        f"stride_{name}{axis}": tensor.stride(index)
        for name, tensor in zip("qkvo", (q, k, v, out), strict=True)
        for index, axis in enumerate(("b", "h", "n" if name in "kv" else "m"))
    }
    arguments = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse}
    numbers = {"factor": (d**-0.5 if scale is None else scale) * LOG2E, "heads": heads,
               "group": heads // k.shape[1], "m": m, "n": k.shape[2]}  # fmt: skip
    return Launch(
        kernel=_softmax,
        grid=(triton.cdiv(m, config.block_m), batch * heads, 1),
        arguments={**arguments, **numbers, **strides},
        constants={"CAUSAL": causal, "D": d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
        config=config,
    )


def attention(q, k, v, *, causal, config=None):
    """Run it: `[batch, heads, m, d]` -> the same."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if config is None:
        config = CONFIGS["sm_90"][q.shape[-1]]
    plan(q, k, v, out, lse, causal=causal, config=config).run()
    return out


def shipped(*, target, head_dim, dtype=torch.bfloat16, causal, heads=16, kv_heads=16, tokens=4096,
            config=None):  # fmt: skip
    """As `attnvariants.fused.shipped`: `{"forward": Launch}` over meta tensors."""

    def empty(count):
        return torch.empty(1, count, tokens, head_dim, dtype=dtype, device="meta")

    q, k, v = empty(heads), empty(kv_heads), empty(kv_heads)
    lse = torch.empty(1, heads, tokens, dtype=torch.float32, device="meta")
    config = config or CONFIGS[target][head_dim]
    return {"forward": plan(q, k, v, torch.empty_like(q), lse, causal=causal, config=config)}
