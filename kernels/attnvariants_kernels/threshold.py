"""Thresholds of rows: few dense sweeps, an exact solution, and the key tiles that have support.

Rows of scores s get weights relu(s - tau) that sum to one. The first sweep over the keys finds the
row maximum m and, from the largest score of every tile, a lower bound of tau: no (sum - 1) / count
of any set of scores is above tau. A second sweep stores the few scores over the bound, on which
Newton's method ends at the exact tau without reading a key again. Where they are too many, or tied,
the second sweep is a Newton step, and so are those that follow. Every sweep visits only the tiles
in which the one before found something.

What is left of the tiles is saved as one bit each, in a plane of `saved` beside the thresholds: a
block of rows has 32 bits for each of its rows. The streaming kernels go through lists made of them.
"""

from __future__ import annotations

from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.functions import LOWEST
from attnvariants_kernels.tiles import (
    edge_tile,
    key_span,
    load_tile,
    row_span,
    sequence,
    shaped_scores,
    unit_of,
    visibility,
)

# the plane of `saved` with the bits, after maxima, thresholds and 1 / size of the support
_ACTIVE = tl.constexpr(3)
# Newton's steps below this are rounding, and the bound may be off by so much of the maximum
_STEP = tl.constexpr(2.0**-23)
_SLACK = tl.constexpr(2.0**-18)
_MOST_SWEEPS = tl.constexpr(64)


@jit
def _bits_each(m0, M, N, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Keys that one bit of the block of rows from m0 on stands for."""
    return WIDE * tl.cdiv(N, 32 * WIDE * tl.minimum(M - m0, TALL))


@jit
def _scores(
    q, k_ptr, k_stride, n0, m0, scale, batch, head, z, at, extra, OPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    M, N, offset = at
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    cols = n0 + tl.arange(0, BLOCK_N)[None, :]
    k = load_tile(k_ptr, n0, k_stride, N, DIM, BLOCK_N, BLOCK_DIM, EDGE)
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    keep = visibility(rows, cols, batch, head, at, extra, False, EDGE)
    x, unit, _ = shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS)
    return x, unit


@jit
def _bound_tile(
    stats, kept, list_ptr, q, k_ptr, k_stride, n0, m0, scale, batch, head, z, at, extra,
    OPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, bound, total, size, sums = stats
    x, unit = _scores(
        q, k_ptr, k_stride, n0, m0, scale, batch, head, z, at, extra, OPS, DIM, BLOCK_DIM,
        BLOCK_M, BLOCK_N, EDGE, PRECISION,
    )  # fmt: skip
    # maxima skip NaN, a sum does not
    sums += tl.sum(x, 1)
    peak = tl.max(x, 1)
    m = tl.maximum(m, peak)
    peak *= unit
    bound = tl.maximum(bound, m * unit - 1.0)
    over = peak >= bound
    total += tl.where(over, peak, 0.0)
    size += over.to(tl.float32)
    least = (total - 1.0) / tl.maximum(size, 1.0) - tl.abs(m * unit) * _SLACK
    bound = tl.where(size > 0, tl.maximum(bound, least), bound)
    tl.store(list_ptr, n0)
    found = tl.max((peak >= bound).to(tl.int32), 0)
    return (m, bound, total, size, sums), kept + found


@jit
def _newton_tile(
    stats, kept, list_ptr, m, tau, kept_ptr, q, k_ptr, k_stride, n0, m0, scale, batch, head, z, at,
    extra, OPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, KEEP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    total, size, least, stored = stats
    x, unit = _scores(
        q, k_ptr, k_stride, n0, m0, scale, batch, head, z, at, extra, OPS, DIM, BLOCK_DIM,
        BLOCK_M, BLOCK_N, EDGE, PRECISION,
    )  # fmt: skip
    # a difference first, which is exact where it counts
    y = (x - m[:, None]) * unit
    w = y - tau[:, None]
    inside = w > 0
    total += tl.sum(tl.maximum(w, 0.0), 1)
    least = tl.minimum(least, tl.min(tl.where(inside, w, 1.0), 1))
    found = tl.sum(inside.to(tl.float32), 1).to(tl.int32)
    size += found
    most = tl.max(found, 0)
    rounds = tl.where((most <= MOST) & (tl.max(stored, 0) <= KEEP), most, 0)
    found += stored
    rest = tl.where(inside, y, -4.0)
    lines = tl.arange(0, BLOCK_M) * KEEP
    while rounds > 0:
        peak = tl.max(rest, 1)
        rest = tl.where(rest == peak[:, None], -4.0, rest)
        some = peak > -4.0
        tl.store(kept_ptr + lines + stored, peak, mask=some & (stored < KEEP))
        stored += some.to(tl.int32)
        rounds -= 1
    # ties, which went as one, or too many
    stored = tl.where(stored < found, KEEP + 1, stored)
    tl.store(list_ptr, n0)
    return (total, size, least, stored), kept + tl.minimum(most, 1)


@jit
def _newton(total, size, least):
    """(step of tau from below, whether some scores fall out by it)."""
    step = (total - 1.0) / tl.maximum(size, 1).to(tl.float32)
    step = tl.where(size > 0, tl.maximum(step, 0.0), 0.0)
    return step, (step >= least) & (step > _STEP)


@jit
def _solve(kept_ptr, tau, size, BLOCK_M: tl.constexpr, KEEP: tl.constexpr):
    """tau of the rows with scores stored, `size` of them; that of the others stays."""
    column = tl.arange(0, KEEP)[None, :]
    where = kept_ptr + tl.arange(0, BLOCK_M)[:, None] * KEEP + column
    y = tl.load(where, mask=column < size[:, None], other=-2.0)
    more = tl.max(size, 0)
    while more > 0:
        w = y - tau[:, None]
        inside = w > 0
        least = tl.min(tl.where(inside, w, 1.0), 1)
        step, unsettled = _newton(
            tl.sum(tl.maximum(w, 0.0), 1), tl.sum(inside.to(tl.int32), 1), least
        )
        tau += step
        more = tl.max(unsettled.to(tl.int32), 0)
    return tau


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane", "width"])
def solve_kernel(
    q_ptr, k_ptr, saved_ptr, kept_ptr, places_ptr, sweeps_ptr, q_strides, k_strides,
    extra, scale, heads, kv_heads, M, N, offset, total_q, plane, width,
    OPS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
    MOST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Maxima, thresholds and active tiles of one block of rows of one head.

    `places` and `kept` are this program's lists of tiles and of scores; `sweeps` counts the tiles
    visited, and may be None.
    """
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
    program = (z * heads + head) * tl.num_programs(0) + m0 // BLOCK_M
    kept_ptr += program * (BLOCK_M * KEEP)
    fulls = places_ptr + program * width
    borders = fulls + (width - 1)

    q = load_tile(q_ptr, m0, q_strides[2], M, DIM, BLOCK_M, BLOCK_DIM, True)
    lines = tl.arange(0, BLOCK_M)
    rows = m0 + lines
    zero = tl.zeros([BLOCK_M], tl.float32)
    start, full, edge, before, edges = key_span(m0, M, N, offset, extra, BLOCK_M, BLOCK_N)
    visited = edges + (edge - full) // BLOCK_N
    # rows beyond M never find anything
    bound = tl.where(rows < M, LOWEST, -LOWEST)
    stats = (zero + LOWEST, bound, zero, zero, zero)
    listed_edges = M * 0
    for tile in tl.range(0, edges, num_stages=1):
        n0 = edge_tile(tile, start, edge, before, BLOCK_N)
        stats, listed_edges = _bound_tile(
            stats, listed_edges, borders - listed_edges, q, k_ptr, k_strides[2], n0, m0, scale,
            batch, head, z, at, extra, OPS, DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, True,
            PRECISION,
        )  # fmt: skip
    listed = M * 0
    for n0 in tl.range(full, edge, BLOCK_N):
        stats, listed = _bound_tile(
            stats, listed, fulls + listed, q, k_ptr, k_strides[2], n0, m0, scale, batch, head, z,
            at, extra, OPS, DIM, BLOCK_DIM, BLOCK_M, BLOCK_N, False, PRECISION,
        )  # fmt: skip

    m = tl.where(rows < M, stats[0], -LOWEST)
    largest = m * unit_of(scale, extra)
    # from below, however coarse float32 is beside the largest score
    tau = tl.minimum(stats[1] - largest, 0.0) - tl.abs(largest) * (4.0 * _STEP)
    tau = tl.maximum(tau, -1.0)
    found = lines * 0
    more = M * 0 + 1
    sweep = M * 0
    while more > 0:
        # what other threads wrote is read from here on
        tl.debug_barrier()
        visited += listed + listed_edges
        counts = (zero, lines * 0, zero + 1.0, lines * 0)
        kept = M * 0
        for i in tl.range(0, listed_edges, num_stages=1):
            counts, kept = _newton_tile(
                counts, kept, borders - kept, m, tau, kept_ptr, q, k_ptr, k_strides[2],
                tl.load(borders - i), m0, scale, batch, head, z, at, extra, OPS, DIM, BLOCK_DIM,
                BLOCK_M, BLOCK_N, True, PRECISION, KEEP, MOST,
            )  # fmt: skip
        listed_edges = kept
        kept = M * 0
        for i in tl.range(0, listed):
            counts, kept = _newton_tile(
                counts, kept, fulls + kept, m, tau, kept_ptr, q, k_ptr, k_strides[2],
                tl.load(fulls + i), m0, scale, batch, head, z, at, extra, OPS, DIM, BLOCK_DIM,
                BLOCK_M, BLOCK_N, False, PRECISION, KEEP, MOST,
            )  # fmt: skip
        listed = kept
        total, size, least, stored = counts
        step, unsettled = _newton(total, size, least)
        most = tl.max(tl.where(unsettled, stored, 0), 0)
        tau += step
        sweep += 1
        if (most <= KEEP) | (sweep >= _MOST_SWEEPS):
            more = more * 0
        found = tl.where(unsettled & (stored <= KEEP), stored, 0)

    # through memory, or else the layout of what follows would be that of the sweeps
    where = saved_ptr + (batch * heads + head) * total_q + first_q + rows
    tl.store(where, m, mask=rows < M)
    tl.store(where + plane, tau, mask=rows < M)
    sound = stats[4] == stats[4]
    sizes = where + 2 * tl.cast(plane, tl.int64)
    tl.store(sizes, tl.where(sound, found, -1).to(tl.float32), mask=rows < M)
    tl.debug_barrier()
    tau = tl.load(where + plane, mask=rows < M, other=0.0)
    found = tl.load(sizes, mask=rows < M, other=0.0).to(tl.int32)
    tau = _solve(kept_ptr, tau, found, BLOCK_M, KEEP)
    tau = tl.where(tl.load(sizes, mask=rows < M, other=0.0) < 0, float("nan"), tau)
    tl.store(where + plane, tau, mask=rows < M)
    width_of_bit = _bits_each(m0, M, N, BLOCK_M, WIDE)
    words = lines * 0
    for i in range(0, listed):
        bit = tl.load(fulls + i) // width_of_bit
        words = words | tl.where(lines == bit // 32, 1 << (bit % 32), 0)
    for i in range(0, listed_edges):
        bit = tl.load(borders - i) // width_of_bit
        words = words | tl.where(lines == bit // 32, 1 << (bit % 32), 0)
    active_ptr = saved_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    active_ptr += _ACTIVE * tl.cast(plane, tl.int64)
    active_ptr += (batch * heads + head) * total_q + first_q
    tl.store(active_ptr + rows, words, mask=rows < M)
    if sweeps_ptr is not None:
        tl.store(sweeps_ptr + program * 2, sweep + 1)
        tl.store(sweeps_ptr + program * 2 + 1, visited)


@jit
def _is_active(
    active_ptr, m0, n0, M, N, seen, TALL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether tiles [m0 .. + BLOCK_M, n0 .. + BLOCK_N] have support, where `seen`."""
    found = n0 < 0
    for i in tl.static_range(max(BLOCK_M // TALL, 1)):
        top = m0 // TALL * TALL + i * TALL
        for j in tl.static_range(max(BLOCK_N // WIDE, 1)):
            key = n0 + j * WIDE
            inside = seen & (top < M) & (key < N)
            bit = key // tl.maximum(_bits_each(tl.minimum(top, M - 1), M, N, TALL, WIDE), 1)
            word = tl.load(active_ptr + top + bit // 32, mask=inside, other=0)
            found = found | (((word >> (bit % 32)) & 1) != 0)
    return found


@jit(do_not_specialize=["heads", "kv_heads", "M", "N", "offset", "total_q", "plane", "width"])
def list_kernel(
    saved_ptr, places_ptr, counts_ptr, extra, heads, kv_heads, M, N, offset, total_q, plane, width,
    BY_KEY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`Tiles` of one program of a streaming kernel with blocks BLOCK_M x BLOCK_N."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    z = tl.program_id(2)
    program = (z * tl.num_programs(1) + head) * tl.num_programs(0) + block
    batch, first_q, first_k, M, N, offset = sequence(z, M, N, offset, extra)
    if BY_KEY:
        n0 = block * BLOCK_N
        if n0 >= N:
            return
        start, full, edge, before, edges = row_span(n0, M, N, offset, extra, BLOCK_M, BLOCK_N)
        fulls = (edge - full) // BLOCK_M
        group = heads // kv_heads
        first = head * group
    else:
        m0 = block * BLOCK_M
        if m0 >= M:
            return
        start, full, edge, before, edges = key_span(m0, M, N, offset, extra, BLOCK_M, BLOCK_N)
        fulls = (edge - full) // BLOCK_N
        group = 1
        first = head
    active_ptr = saved_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    active_ptr += _ACTIVE * tl.cast(plane, tl.int64)
    active_ptr += (batch * heads + first) * total_q + first_q
    places_ptr += program * width
    rounded = tl.cdiv(M, BLOCK_M) * BLOCK_M
    kept = M * 0
    for part in tl.static_range(2):
        each = edges if part else fulls
        earlier = kept
        for chunk in range(0, group * each, CHUNK):
            index = chunk + tl.arange(0, CHUNK)
            seen = index < group * each
            which = index // tl.maximum(each, 1)
            tile = index - which * each
            if BY_KEY:
                place = full + tile * BLOCK_M
                if part:
                    place = edge_tile(tile, start, edge, before, BLOCK_M)
                found = _is_active(
                    active_ptr + which.to(tl.int64) * total_q, place, n0 + index * 0, M, N, seen,
                    TALL, WIDE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                place = which * rounded + place
            else:
                place = full + tile * BLOCK_N
                if part:
                    place = edge_tile(tile, start, edge, before, BLOCK_N)
                found = _is_active(
                    active_ptr, m0 + index * 0, place, M, N, seen, TALL, WIDE, BLOCK_M, BLOCK_N
                )
            count = found.to(tl.int32)
            tl.store(places_ptr + kept - 1 + tl.cumsum(count, 0), place, mask=found)
            kept += tl.sum(count, 0)
        tl.store(counts_ptr + program * 2 + part, kept - earlier)
