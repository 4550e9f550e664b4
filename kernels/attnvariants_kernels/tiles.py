"""What every streaming kernel does with a tile: its place, scores, mask and dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

from attnvariants_kernels._triton import jit, tl
from attnvariants_kernels.functions import tanh


class Dropout(NamedTuple):
    """Philox dropout: keep a weight if its word is at least `threshold`."""

    threshold: Any
    factor: Any
    seed: Any


class Extra(NamedTuple):
    """The optional parts of a call; what is None costs nothing.

    `key_mask` hides keys of all rows alike, `mask` single entries; both are uint8, nonzero =
    visible. Strides are of (batch, head, row, key), without those that a tensor lacks. `tiles`
    lists the tiles to visit, see `attnvariants_kernels.threshold`; None visits all that are seen.
    """

    left: Any
    right: Any
    softcap: Any
    key_mask: Any
    key_mask_strides: Any
    mask: Any
    mask_strides: Any
    bias: Any
    bias_strides: Any
    slopes: Any
    slopes_strides: Any
    visible: Any
    visible_strides: Any
    cu_q: Any
    cu_k: Any
    dropout: Any
    tiles: Any = None


@jit
def sequence(z, M, N, offset, extra):
    """(batch, first query, first key, queries, keys, offset) of sequence z of a call."""
    batch = z.to(tl.int64)
    first_q = batch * 0
    first_k = batch * 0
    if extra.cu_q is not None:
        first_q = tl.load(extra.cu_q + z).to(tl.int64)
        first_k = tl.load(extra.cu_k + z).to(tl.int64)
        M = (tl.load(extra.cu_q + z + 1) - first_q).to(tl.int32)
        N = (tl.load(extra.cu_k + z + 1) - first_k).to(tl.int32)
        offset = N - M
        batch = batch * 0
    return batch, first_q, first_k, M, N, offset


@jit
def _cut(start, full, edge, stop, BLOCK: tl.constexpr):
    """(start, full, edge, edge tiles before `full`, edge tiles in all); see `key_span`."""
    edge = tl.maximum(edge // BLOCK * BLOCK, full)
    before = tl.cdiv(tl.maximum(tl.minimum(full, stop) - start, 0), BLOCK)
    after = tl.cdiv(tl.maximum(stop - edge, 0), BLOCK)
    return start, full, edge, before, before + after


@jit
def edge_tile(index, start, edge, before, BLOCK: tl.constexpr):
    """Where edge tile `index` begins."""
    return tl.where(index < before, start + index * BLOCK, edge + (index - before) * BLOCK)


@jit
def _program(block, head, z):
    return (z * tl.num_programs(1) + head).to(tl.int64) * tl.num_programs(0) + block


@jit
def list_of(block, head, z, extra):
    """Where the tiles to visit are listed; None if they are not."""
    # a tuple with a None in it cannot be returned
    if extra.tiles is not None:
        return extra.tiles.places + _program(block, head, z) * extra.tiles.width


@jit
def listed(span, block, head, z, extra, BLOCK: tl.constexpr):
    """The span, which counts listed tiles if there are any lists."""
    start, full, edge, before, edges = span
    if extra.tiles is not None:
        program = _program(block, head, z)
        full = full * 0
        edge = tl.load(extra.tiles.counts + program * 2) * BLOCK
        edges = tl.load(extra.tiles.counts + program * 2 + 1)
    return start, full, edge, before, edges


@jit
def full_place(index, places, BLOCK: tl.constexpr):
    """Where the full tile `index` of a loop over full .. edge begins."""
    if places is not None:
        return tl.load(places + index // BLOCK)
    return index


@jit
def edge_place(index, span, places, BLOCK: tl.constexpr):
    """Where edge tile `index` begins."""
    if places is not None:
        return tl.load(places + span[2] // BLOCK + index)
    return edge_tile(index, span[0], span[2], span[3], BLOCK)


@jit
def key_span(m0, M, N, offset, extra, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that rows m0 .. m0 + BLOCK_M see, in tiles of BLOCK_N.

    Tiles full .. edge hide nothing and run without a mask; the others, `before` of them from
    `start` on and the rest from `edge` on, share one masked loop: see `_cut`.
    """
    first = m0 + offset
    last = tl.minimum(m0 + BLOCK_M, M) - 1 + offset
    start, full, stop, edge = N * 0, N * 0, N, N
    if extra.left is not None:
        start = tl.minimum(tl.maximum(first - extra.left, 0), N) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(last - extra.left, 0), BLOCK_N) * BLOCK_N
    if extra.right is not None:
        stop = tl.minimum(tl.maximum(last + extra.right + 1, 0), N)
        edge = tl.minimum(tl.maximum(first + extra.right + 1, 0), N)
    return _cut(start, full, edge, stop, BLOCK_N)


@jit
def row_span(n0, M, N, offset, extra, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows that see keys n0 .. n0 + BLOCK_N, cut as in `key_span`, in tiles of BLOCK_M."""
    last = tl.minimum(n0 + BLOCK_N, N) - 1
    start, full, stop, edge = M * 0, M * 0, M, M
    if extra.right is not None:
        start = tl.minimum(tl.maximum(n0 - extra.right - offset, 0), M) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(last - extra.right - offset, 0), BLOCK_M) * BLOCK_M
    if extra.left is not None:
        stop = tl.minimum(tl.maximum(last + extra.left - offset + 1, 0), M)
        edge = tl.minimum(tl.maximum(n0 + extra.left - offset + 1, 0), M)
    return _cut(start, full, edge, stop, BLOCK_M)


@jit
def visible_keys(rows, batch, head, first_q, M, N, offset, extra):
    """Number of keys that each row sees, float32, at least 1."""
    if extra.visible is not None:
        strides = extra.visible_strides
        where = extra.visible + batch * strides[0] + head * strides[1]
        n = tl.load(where + (first_q + rows) * strides[2], mask=rows < M, other=1)
    else:
        low = rows * 0
        high = low + N
        if extra.left is not None:
            low = tl.minimum(tl.maximum(rows + offset - extra.left, 0), N)
        if extra.right is not None:
            high = tl.minimum(tl.maximum(rows + offset + extra.right + 1, 0), N)
        n = high - low
    return tl.maximum(n, 1).to(tl.float32)


@jit
def visibility(
    rows, cols, batch, head, at, extra, BY_KEY: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """Bool tile of what is visible; None if everything is.

    Bounds are worked out along the axis of the tile that a thread holds few of, the keys if
    BY_KEY, and compared along the other. Rows beyond M are hidden if BY_KEY alone, keys beyond N
    if not: what they lead to otherwise is never stored.
    """
    M, N, offset = at
    keep = None
    if EDGE and BY_KEY:
        high = cols * 0 + M
        if extra.left is not None:
            high = tl.minimum(cols - offset + extra.left + 1, M)
        keep = rows < high
        if extra.right is not None:
            keep = keep & (rows >= cols - offset - extra.right)
    elif EDGE:
        high = rows * 0 + N
        if extra.right is not None:
            high = tl.minimum(rows + offset + extra.right + 1, N)
        keep = cols < high
        if extra.left is not None:
            keep = keep & (cols >= rows + offset - extra.left)
    if extra.key_mask is not None:
        strides = extra.key_mask_strides
        where = extra.key_mask + batch * strides[0] + head * strides[1]
        seen = tl.load(where + cols.to(tl.int64) * strides[2], mask=cols < N, other=0) != 0
        keep = (seen & (rows < M)) if keep is None else keep & seen
    if extra.mask is not None:
        strides = extra.mask_strides
        where = extra.mask + batch * strides[0] + head * strides[1]
        where = where + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        seen = tl.load(where, mask=(rows < M) & (cols < N), other=0) != 0
        keep = seen if keep is None else keep & seen
    return keep


@jit
def unit_of(scale, extra):
    """The `unit` of `shaped_scores`."""
    unit = scale
    if (extra.softcap is not None) or (extra.bias is not None) or (extra.slopes is not None):
        unit = 1.0
    return unit


@jit
def shaped_scores(x, scale, rows, cols, batch, head, z, at, keep, extra, OPS: tl.constexpr):
    """Of products x = q.k: (x, unit, slope of the softcap), with s = unit x."""
    M, N, offset = at
    unit = unit_of(scale, extra)
    cap_slope = 1.0
    if (extra.softcap is not None) or (extra.bias is not None) or (extra.slopes is not None):
        x = x * scale
    if extra.softcap is not None:
        t = tanh(x / extra.softcap)
        cap_slope = 1.0 - t * t
        x = t * extra.softcap
    if extra.slopes is not None:
        strides = extra.slopes_strides
        slope = tl.load(extra.slopes + z.to(tl.int64) * strides[0] + head * strides[1])
        x = x - slope * tl.abs(rows + offset - cols).to(tl.float32)
    if extra.bias is not None:
        strides = extra.bias_strides
        where = extra.bias + batch * strides[0] + head * strides[1]
        where = where + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        x = x + tl.load(where, mask=(rows < M) & (cols < N), other=0).to(tl.float32)
    if keep is not None:
        x = tl.where(keep, x, OPS.hidden)
    return x, unit, cap_slope


@jit
def _stretch(peak):
    """The power of two that takes `peak` to [2^14, 2^15), or 2^63 or 2^-63 where it is beyond."""
    exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 78 << 23), 204 << 23)
    # 268 = 127 + 127 + 14 does not fit beside the sign
    return ((134 << 23) - exponent + (134 << 23)).to(tl.float32, bitcast=True)


@jit
def add_product(
    acc, peak, tile, other, rescale, RESCALE: tl.constexpr, FIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, peak), acc = rescale acc + tile @ other in other's dtype.

    If FIT and that is float16, `acc` is in units of each row's own that let the largest entry of
    its tiles, `peak`, use the format's range: neither overflows nor underflows before it counts.
    `fitted` takes the units off.
    """
    if FIT and other.dtype == tl.float16:
        before = _stretch(peak)
        peak = tl.maximum(peak * rescale, tl.max(tl.abs(tile), 1))
        stretch = _stretch(peak)
        acc = acc * (stretch / before * rescale)[:, None]
        tile = tile * stretch[:, None]
    elif RESCALE:
        acc = acc * rescale[:, None]
    return tl.dot(tile.to(other.dtype), other, acc, input_precision=PRECISION), peak


@jit
def fitted(acc, peak, dtype: tl.constexpr, FIT: tl.constexpr):
    """What `add_product` accumulated with `other` of this dtype."""
    if FIT and dtype == tl.float16:
        acc = acc * (1.0 / _stretch(peak))[:, None]
    return acc


@jit
def dropout_factors(m0, n0, line, kv_len, drop, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: 0 where dropped, `factor` where kept.

    `line` is the counter's row (batch * heads + head) * q_len + m0; see attnvariants/dropout.py.
    """
    fours = (kv_len + 3) // 4
    lines = line + tl.arange(0, BLOCK_M)
    columns = n0 // 4 + tl.arange(0, BLOCK_N // 4)
    counter = lines[:, None] * fours + columns[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(drop.seed, low, high, low * 0, low * 0)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK_M, BLOCK_N)
    return tl.where(words.to(tl.int64) >= drop.threshold, drop.factor, 0.0)


@jit
def load_tile(
    pointer, start, stride, stop, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_WIDTH] of rows start .. start + BLOCK, zeros beyond `stop` and WIDTH."""
    line = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    # What a thread's loads have apart, a whole number of steps, is 64-bit and the same for all
    # threads: with one offset of its own a thread needs a third of the registers.
    STEP: tl.constexpr = 2048 // BLOCK_WIDTH
    where = pointer + tl.cast(start, tl.int64) * stride + ((line & (STEP - 1)) * stride + column)
    where = where + (line & -STEP).to(tl.int64) * stride
    if EDGE and WIDTH != BLOCK_WIDTH:
        return tl.load(where, mask=(start + line < stop) & (column < WIDTH), other=0.0)
    if EDGE:
        return tl.load(where, mask=start + line < stop, other=0.0)
    if WIDTH != BLOCK_WIDTH:
        return tl.load(where, mask=column < WIDTH, other=0.0)
    return tl.load(where)
