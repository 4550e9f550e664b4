"""The forward kernel of the streaming template."""

from __future__ import annotations

from attnvariants_kernels._triton import cuda_capability_geq, jit, tl
from attnvariants_kernels.tiles import (
    add_product,
    dropout_factors,
    edge_place,
    edge_tile,
    fitted,
    full_place,
    key_span,
    list_of,
    listed,
    load_tile,
    sequence,
    shaped_scores,
    unit_of,
    visibility,
    visible_keys,
)


@jit
def _sweep_tile(
    stats, q, k_ptr, k_stride, n0, m0, n, scale, theta, index, batch, head, z, at, extra,
    OPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_tile(k_ptr, n0, k_stride, N, DIM, BLOCK_N, BLOCK_DIM, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    keep = visibility(rows, cols, batch, head, at, extra, False, EDGE)
    x, unit, _ = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    return OPS.sweep(stats, x, unit, keep, cols, n, theta, index)


@jit
def _fold_tile(
    stats, acc, peak, q, k_ptr, v_ptr, k_stride, v_stride, n0, m0, n, scale, theta, batch, head,
    z, at,
    heads, extra, OPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_tile(k_ptr, n0, k_stride, N, DIM, BLOCK_N, BLOCK_DIM, EDGE)
    v = load_tile(v_ptr, n0, v_stride, N, V_DIM, BLOCK_N, BLOCK_V, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    keep = visibility(rows, cols, batch, head, at, extra, False, EDGE)
    x, unit, _ = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    stats, w, rescale = OPS.fold(stats, x, unit, keep, cols, n, theta)
    if keep is not None and not OPS.hides:
        w = tl.where(keep, w, 0.0)
    if extra.dropout is not None:
        line = (batch * heads + head) * M + m0
        w = w * dropout_factors(m0, n0, line, N, extra.dropout, BLOCK_M, BLOCK_N)
    acc, peak = add_product(acc, peak, w, v, rescale, OPS.rescales, OPS.scaled, PRECISION)
    return stats, acc, peak


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, saved_ptr, q_strides, k_strides, v_strides, out_strides,
    extra, theta, scale, heads, kv_heads, M, N, offset, total_q, plane,
    OPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and saved rows of one block of rows of one head.

    Strides are of (batch, head, row); `plane` is the size of one saved row vector of the call.
    """
    # the last rows of a causal call see the most keys: they go first
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    z = tl.program_id(2)
    batch, first_q, first_k, M, N, offset = sequence(z, M, N, offset, extra)
    if m0 >= M:
        return
    at = (M, N, offset)
    kv_head = head // (heads // kv_heads)
    q_ptr += batch * q_strides[0] + head * q_strides[1] + first_q * q_strides[2]
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + first_k * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + first_k * v_strides[2]
    out_ptr += batch * out_strides[0] + head * out_strides[1] + first_q * out_strides[2]

    q = load_tile(q_ptr, m0, q_strides[2], M, DIM, BLOCK_M, BLOCK_DIM, True)
    rows = m0 + tl.arange(0, BLOCK_M)
    n = 1.0
    if OPS.needs_n:
        n = visible_keys(rows, batch, head, first_q, M, N, offset, extra)
    start, full, edge, before, edges = key_span(m0, M, N, offset, extra, BLOCK_M, BLOCK_N)
    stats = OPS.start(BLOCK_M)
    if OPS.listed:
        where = saved_ptr + (batch * heads + head) * total_q + first_q + rows
        given = tl.load(where, mask=rows < M, other=0.0)
        stats = (given, tl.load(where + plane, mask=rows < M, other=0.0)) + stats
    if OPS.sweeps > 0:
        for sweep in range(OPS.sweeps):
            for n0 in tl.range(full, edge, BLOCK_N):
                stats = _sweep_tile(
                    stats, q, k_ptr, k_strides[2], n0, m0, n, scale, theta, sweep, batch, head,
                    z, at, extra, OPS, DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, False, PRECISION,
                )  # fmt: skip
            for tile in tl.range(0, edges, num_stages=1):
                n0 = edge_tile(tile, start, edge, before, BLOCK_N)
                stats = _sweep_tile(
                    stats, q, k_ptr, k_strides[2], n0, m0, n, scale, theta, sweep, batch, head,
                    z, at, extra, OPS, DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, True, PRECISION,
                )  # fmt: skip

    span = start, full, edge, before, edges
    places = list_of(m0 // BLOCK_M, head, z, extra)
    span = listed(span, m0 // BLOCK_M, head, z, extra, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(span[1], span[2], BLOCK_N):
        n0 = full_place(tile, places, BLOCK_N)
        stats, acc, peak = _fold_tile(
            stats, acc, peak, q, k_ptr, v_ptr, k_strides[2], v_strides[2], n0, m0, n, scale, theta,
            batch, head, z, at, heads, extra, OPS, DIM, V_DIM, BLOCK_DIM, BLOCK_V, BLOCK_M,
            BLOCK_N, False, PRECISION,
        )  # fmt: skip
    # pipelined on Hopper, its registers would be the loop above's spills
    for tile in tl.range(0, span[4], num_stages=1 if cuda_capability_geq(9) else None):
        n0 = edge_place(tile, span, places, BLOCK_N)
        stats, acc, peak = _fold_tile(
            stats, acc, peak, q, k_ptr, v_ptr, k_strides[2], v_strides[2], n0, m0, n, scale, theta,
            batch, head, z, at, heads, extra, OPS, DIM, V_DIM, BLOCK_DIM, BLOCK_V, BLOCK_M,
            BLOCK_N, True, PRECISION,
        )  # fmt: skip

    factor, saved = OPS.finish(stats, unit_of(scale, extra), n, theta)
    acc = fitted(acc, peak, v_ptr.dtype.element_ty, OPS.scaled) * factor[:, None]
    width = tl.arange(0, BLOCK_V)[None, :]
    where = (
        out_ptr
        + tl.cast(m0, tl.int64) * out_strides[2]
        + tl.arange(0, BLOCK_M)[:, None] * (out_strides[2])
    )
    tl.store(
        where + width, acc.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (width < V_DIM)
    )
    where = saved_ptr + (batch * heads + head) * total_q + first_q + rows
    for i in tl.static_range(OPS.saves - OPS.listed):
        tl.store(where + i * tl.cast(plane, tl.int64), saved[i], mask=rows < M)
