"""The backward kernels of the streaming template: delta, dq and dk with dv."""

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
    row_span,
    sequence,
    shaped_scores,
    visibility,
    visible_keys,
)


@jit
def _load_row(pointer, mask, AXIS: tl.constexpr, EDGE: tl.constexpr):
    if EDGE:
        return tl.expand_dims(tl.load(pointer, mask=mask, other=0.0), AXIS)
    return tl.expand_dims(tl.load(pointer), AXIS)


@jit
def _load_rows(
    pointer, plane, mask, COUNT: tl.constexpr, AXIS: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """A tuple of COUNT row vectors, expanded along AXIS."""
    found = (_load_row(pointer, mask, AXIS, EDGE),)
    for i in tl.static_range(1, COUNT):
        found = found + (_load_row(pointer + i * tl.cast(plane, tl.int64), mask, AXIS, EDGE),)
    return found


@jit
def _delta_tile(
    total, q, g, k_ptr, v_ptr, k_stride, v_stride, n0, m0, n, saved, delta0, scale, theta,
    batch, head, z, at, heads, extra, OPS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_tile(k_ptr, n0, k_stride, N, DIM, BLOCK_N, BLOCK_DIM, EDGE)
    v = load_tile(v_ptr, n0, v_stride, N, V_DIM, BLOCK_N, BLOCK_V, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    keep = visibility(rows, cols, batch, head, at, extra, False, EDGE)
    x, unit, _ = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    if extra.dropout is not None:
        line = (batch * heads + head) * M + m0
        dp = dp * dropout_factors(m0, n0, line, N, extra.dropout, BLOCK_M, BLOCK_N)
    term = OPS.delta(x, unit, cols, dp, saved, delta0, n, theta)
    if keep is not None and not OPS.hides:
        term = tl.where(keep, term, 0.0)
    return total + tl.sum(term, 1)


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane"])
def delta_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, saved_ptr, delta_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides,
    extra, theta, scale, heads, kv_heads, M, N, offset, total_q, plane,
    OPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row d_out . out and, where the variant asks for it, the sum of its delta terms."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    z = tl.program_id(2)
    batch, first_q, first_k, M, N, offset = sequence(z, M, N, offset, extra)
    if m0 >= M:
        return
    at = (M, N, offset)
    out_ptr += batch * out_strides[0] + head * out_strides[1] + first_q * out_strides[2]
    grad_ptr += batch * grad_strides[0] + head * grad_strides[1] + first_q * grad_strides[2]
    out = load_tile(out_ptr, m0, out_strides[2], M, V_DIM, BLOCK_M, BLOCK_V, True)
    g = load_tile(grad_ptr, m0, grad_strides[2], M, V_DIM, BLOCK_M, BLOCK_V, True)
    delta0 = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    rows = m0 + tl.arange(0, BLOCK_M)
    where = (batch * heads + head) * total_q + first_q + rows
    tl.store(delta_ptr + where, delta0, mask=rows < M)
    if OPS.delta_sweep:
        kv_head = head // (heads // kv_heads)
        q_ptr += batch * q_strides[0] + head * q_strides[1] + first_q * q_strides[2]
        k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + first_k * k_strides[2]
        v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + first_k * v_strides[2]
        q = load_tile(q_ptr, m0, q_strides[2], M, DIM, BLOCK_M, BLOCK_DIM, True)
        saved = _load_rows(saved_ptr + where, plane, rows < M, OPS.saves, 1, True)
        n = 1.0
        if OPS.needs_n:
            n = visible_keys(rows, batch, head, first_q, M, N, offset, extra)[:, None]
        delta0 = delta0[:, None]
        span = key_span(m0, M, N, offset, extra, BLOCK_M, BLOCK_N)
        places = list_of(m0 // BLOCK_M, head, z, extra)
        span = listed(span, m0 // BLOCK_M, head, z, extra, BLOCK_N)
        total = tl.zeros([BLOCK_M], tl.float32)
        for tile in tl.range(span[1], span[2], BLOCK_N):
            n0 = full_place(tile, places, BLOCK_N)
            total = _delta_tile(
                total, q, g, k_ptr, v_ptr, k_strides[2], v_strides[2], n0, m0, n, saved, delta0,
                scale, theta, batch, head, z, at, heads, extra, OPS, DIM, V_DIM, BLOCK_DIM,
                BLOCK_V, BLOCK_M, BLOCK_N, False, PRECISION,
            )  # fmt: skip
        for tile in tl.range(0, span[4], num_stages=1):
            n0 = edge_place(tile, span, places, BLOCK_N)
            total = _delta_tile(
                total, q, g, k_ptr, v_ptr, k_strides[2], v_strides[2], n0, m0, n, saved, delta0,
                scale, theta, batch, head, z, at, heads, extra, OPS, DIM, V_DIM, BLOCK_DIM,
                BLOCK_V, BLOCK_M, BLOCK_N, True, PRECISION,
            )  # fmt: skip
        tl.store(delta_ptr + plane + where, total, mask=rows < M)


@jit
def _dq_tile(
    dq, peak, slope_sum, q, g, k_ptr, v_ptr, dbias_ptr, k_stride, v_stride, n0, m0, n, saved, delta,
    scale, theta, batch, head, z, at, heads, extra, OPS: tl.constexpr, DIM: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_tile(k_ptr, n0, k_stride, N, DIM, BLOCK_N, BLOCK_DIM, EDGE)
    v = load_tile(v_ptr, n0, v_stride, N, V_DIM, BLOCK_N, BLOCK_V, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    keep = visibility(rows, cols, batch, head, at, extra, False, EDGE)
    x, unit, cap_slope = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    if extra.dropout is not None:
        line = (batch * heads + head) * M + m0
        dp = dp * dropout_factors(m0, n0, line, N, extra.dropout, BLOCK_M, BLOCK_N)
    _, ds = OPS.grad(x, unit, cols, dp, saved, delta, n, theta)
    if keep is not None and not OPS.hides:
        ds = tl.where(keep, ds, 0.0)
    if dbias_ptr is not None:
        where = dbias_ptr + rows.to(tl.int64) * N + cols
        tl.store(where, ds, mask=(rows < M) & (cols < N))
    if SLOPES:
        slope_sum -= tl.sum(ds * tl.abs(rows + offset - cols).to(tl.float32), 1)
    if extra.softcap is not None:
        ds = ds * cap_slope
    dq, peak = add_product(dq, peak, ds, k, 1.0, False, True, PRECISION)
    return dq, peak, slope_sum


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, saved_ptr, delta_ptr, dq_ptr, dbias_ptr, dslopes_ptr,
    q_strides, k_strides, v_strides, grad_strides, dq_strides,
    extra, theta, scale, heads, kv_heads, M, N, offset, total_q, plane,
    OPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the query, and of bias and slopes where wanted (pointers that are not None)."""
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
    grad_ptr += batch * grad_strides[0] + head * grad_strides[1] + first_q * grad_strides[2]
    dq_ptr += batch * dq_strides[0] + head * dq_strides[1] + first_q * dq_strides[2]
    if dbias_ptr is not None:
        dbias_ptr += (batch * heads + head) * M * N
    SLOPES: tl.constexpr = dslopes_ptr is not None

    q = load_tile(q_ptr, m0, q_strides[2], M, DIM, BLOCK_M, BLOCK_DIM, True)
    g = load_tile(grad_ptr, m0, grad_strides[2], M, V_DIM, BLOCK_M, BLOCK_V, True)
    rows = m0 + tl.arange(0, BLOCK_M)
    where = (batch * heads + head) * total_q + first_q + rows
    saved = _load_rows(saved_ptr + where, plane, rows < M, OPS.saves, 1, True)
    delta = saved
    if OPS.needs_delta:
        delta = _load_rows(delta_ptr + where, plane, rows < M, 1 + OPS.delta_sweep, 1, True)
    n = 1.0
    if OPS.needs_n:
        n = visible_keys(rows, batch, head, first_q, M, N, offset, extra)[:, None]
    span = key_span(m0, M, N, offset, extra, BLOCK_M, BLOCK_N)
    places = list_of(m0 // BLOCK_M, head, z, extra)
    span = listed(span, m0 // BLOCK_M, head, z, extra, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32)
    slope_sum = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(span[1], span[2], BLOCK_N):
        n0 = full_place(tile, places, BLOCK_N)
        dq, peak, slope_sum = _dq_tile(
            dq, peak, slope_sum, q, g, k_ptr, v_ptr, dbias_ptr, k_strides[2], v_strides[2], n0,
            m0, n,
            saved, delta, scale, theta, batch, head, z, at, heads, extra, OPS, DIM, V_DIM,
            BLOCK_DIM, BLOCK_V, BLOCK_M, BLOCK_N, False, PRECISION, SLOPES,
        )  # fmt: skip
    for tile in tl.range(0, span[4], num_stages=1 if cuda_capability_geq(9) else None):
        n0 = edge_place(tile, span, places, BLOCK_N)
        dq, peak, slope_sum = _dq_tile(
            dq, peak, slope_sum, q, g, k_ptr, v_ptr, dbias_ptr, k_strides[2], v_strides[2], n0,
            m0, n,
            saved, delta, scale, theta, batch, head, z, at, heads, extra, OPS, DIM, V_DIM,
            BLOCK_DIM, BLOCK_V, BLOCK_M, BLOCK_N, True, PRECISION, SLOPES,
        )  # fmt: skip
    dq = fitted(dq, peak, k_ptr.dtype.element_ty, True) * scale
    column = tl.arange(0, BLOCK_DIM)[None, :]
    target = dq_ptr + tl.cast(m0, tl.int64) * dq_strides[2]
    target = target + tl.arange(0, BLOCK_M)[:, None] * dq_strides[2] + column
    tl.store(target, dq.to(dq_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (column < DIM))
    if SLOPES:
        tl.store(dslopes_ptr + where, slope_sum, mask=rows < M)


@jit
def _dkv_tile(
    dk, dv, peaks, k, v, q_ptr, grad_ptr, saved_ptr, delta_ptr, q_strides, grad_strides, m0, n0,
    scale,
    theta, batch, head, z, first_q, total_q, plane, at, heads, extra, OPS: tl.constexpr,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)[:, None]
    head = head.to(tl.int64)
    q_ptr += head * q_strides[1]
    grad_ptr += head * grad_strides[1]
    q = load_tile(q_ptr, m0, q_strides[2], M, DIM, BLOCK_M, BLOCK_DIM, EDGE)
    g = load_tile(grad_ptr, m0, grad_strides[2], M, V_DIM, BLOCK_M, BLOCK_V, EDGE)
    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    # after the products, so that these rows hold no registers meanwhile
    base = (batch * heads + head) * total_q + first_q + m0
    where = tl.arange(0, BLOCK_M)
    saved = _load_rows(saved_ptr + base + where, plane, rows < M, OPS.saves, 0, EDGE)
    delta = saved
    if OPS.needs_delta:
        delta = _load_rows(delta_ptr + base + where, plane, rows < M, 1 + OPS.delta_sweep, 0, EDGE)
    n = 1.0
    if OPS.needs_n:
        n = visible_keys(rows, batch, head, first_q, M, N, offset, extra)[None, :]
    line = (batch * heads + head) * M + m0
    rows = rows[None, :]
    keep = visibility(rows, cols, batch, head, at, extra, True, EDGE)
    x, unit, cap_slope = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    if extra.dropout is not None:
        factors = tl.trans(dropout_factors(m0, n0, line, N, extra.dropout, BLOCK_M, BLOCK_N))
        dp = dp * factors
    w, ds = OPS.grad(x, unit, cols, dp, saved, delta, n, theta)
    if extra.dropout is not None:
        w = w * factors
    if keep is not None and not OPS.hides:
        w = tl.where(keep, w, 0.0)
        ds = tl.where(keep, ds, 0.0)
    if extra.softcap is not None:
        ds = ds * cap_slope
    dk_peak, dv_peak = peaks
    dk, dk_peak = add_product(dk, dk_peak, ds, q, 1.0, False, True, PRECISION)
    dv, dv_peak = add_product(dv, dv_peak, w, g, 1.0, False, OPS.scaled, PRECISION)
    return dk, dv, (dk_peak, dv_peak)


@jit
def _next_tile(place, head, start, stop, STEP: tl.constexpr):
    """The place after this one, `start` again with the next head where that is past `stop`."""
    place += STEP
    past = place >= stop
    return tl.where(past, start, place), head + past.to(tl.int32)


@jit
def _listed_tile(place, M, first, BLOCK_M: tl.constexpr):
    """(row, head) that a list of dk/dv names: see `attnvariants_kernels.threshold_plan.Tiles`."""
    place = tl.load(place)
    rounded = tl.cdiv(M, BLOCK_M) * BLOCK_M
    return place % rounded, first + place // rounded


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, saved_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    extra, theta, scale, heads, kv_heads, M, N, offset, total_q, plane,
    OPS: tl.constexpr, DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of key and value of one block of keys, summed over the query heads of its group.

    The loops run over heads and rows at once: nested ones would keep the invariants of all of
    them in registers.
    """
    n0 = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    z = tl.program_id(2)
    batch, first_q, first_k, M, N, offset = sequence(z, M, N, offset, extra)
    if n0 >= N:
        return
    at = (M, N, offset)
    k_ptr += batch * k_strides[0] + kv_head * k_strides[1] + first_k * k_strides[2]
    v_ptr += batch * v_strides[0] + kv_head * v_strides[1] + first_k * v_strides[2]
    q_ptr += batch * q_strides[0] + first_q * q_strides[2]
    grad_ptr += batch * grad_strides[0] + first_q * grad_strides[2]
    k = load_tile(k_ptr, n0, k_strides[2], N, DIM, BLOCK_N, BLOCK_DIM, True)
    v = load_tile(v_ptr, n0, v_strides[2], N, V_DIM, BLOCK_N, BLOCK_V, True)
    dk = tl.zeros([BLOCK_N, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    peaks = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    span = row_span(n0, M, N, offset, extra, BLOCK_M, BLOCK_N)
    places = list_of(tl.program_id(0), kv_head, z, extra)
    span = listed(span, tl.program_id(0), kv_head, z, extra, BLOCK_M)
    start, full, edge, before, edges = span
    group = heads // kv_heads
    # lists hold the tiles of all heads
    rounds = group if places is None else 1
    first_head = tl.program_id(1) * group
    m0, head = full, first_head
    for i in tl.range(rounds * ((edge - full) // BLOCK_M), disable_licm=cuda_capability_geq(9)):
        if places is not None:
            m0, head = _listed_tile(places + i, M, first_head, BLOCK_M)
        dk, dv, peaks = _dkv_tile(
            dk, dv, peaks, k, v, q_ptr, grad_ptr, saved_ptr, delta_ptr, q_strides, grad_strides,
            m0, n0,
            scale, theta, batch, head, z, first_q, total_q, plane, at, heads, extra, OPS, DIM,
            V_DIM, BLOCK_DIM, BLOCK_V, BLOCK_M, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        if places is None:
            m0, head = _next_tile(m0, head, full, edge, BLOCK_M)
    tile, head = edges * 0, first_head
    for i in tl.range(rounds * edges, num_stages=1, disable_licm=cuda_capability_geq(9)):
        if places is None:
            m0 = edge_tile(tile, start, edge, before, BLOCK_M)
        else:
            m0, head = _listed_tile(places + edge // BLOCK_M + i, M, first_head, BLOCK_M)
        dk, dv, peaks = _dkv_tile(
            dk, dv, peaks, k, v, q_ptr, grad_ptr, saved_ptr, delta_ptr, q_strides, grad_strides,
            m0, n0,
            scale, theta, batch, head, z, first_q, total_q, plane, at, heads, extra, OPS, DIM,
            V_DIM, BLOCK_DIM, BLOCK_V, BLOCK_M, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        if places is None:
            tile, head = _next_tile(tile, head, 0, edges, 1)
    dk_ptr += batch * dk_strides[0] + kv_head * dk_strides[1] + first_k * dk_strides[2]
    dv_ptr += batch * dv_strides[0] + kv_head * dv_strides[1] + first_k * dv_strides[2]
    dk = fitted(dk, peaks[0], q_ptr.dtype.element_ty, True) * scale
    dv = fitted(dv, peaks[1], grad_ptr.dtype.element_ty, OPS.scaled)
    seen = (n0 + tl.arange(0, BLOCK_N))[:, None] < N
    line = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, BLOCK_DIM)[None, :]
    target = dk_ptr + tl.cast(n0, tl.int64) * dk_strides[2] + line * dk_strides[2] + column
    tl.store(target, dk.to(dk_ptr.dtype.element_ty), mask=seen & (column < DIM))
    column = tl.arange(0, BLOCK_V)[None, :]
    target = dv_ptr + tl.cast(n0, tl.int64) * dv_strides[2] + line * dv_strides[2] + column
    tl.store(target, dv.to(dv_ptr.dtype.element_ty), mask=seen & (column < V_DIM))
