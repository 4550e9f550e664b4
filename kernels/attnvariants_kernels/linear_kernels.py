"""The kernels of the linear template: carried states, what reads them, and the rows' gradients.

The output and the three gradients of linear attention are one sum,

    r_i = sum_{j visible} (a_i . b_j + alpha_i beta_j) e_j

    out: a, b, e = q, k, v                     dq: a, b, e = g, v, k, alpha beta = -delta_i
    dv:  a, b, e = k, q, g                     dk: a, b, e = v, g, q, alpha beta = -delta_j

with g = d_out / norm and delta = g . out, 0 where the norm is clamped. So one kernel serves all
four: it reads the carried state sum_j b_j e_j^T of the chunks that a tile of rows sees entirely,
and visits one by one only the columns j after the last of these chunks. For dk and dv the rows are
keys, the columns queries, and the states are carried from the last chunk to the first.
"""

from __future__ import annotations

from attnvariants_kernels._triton import jit, tl


@jit
def _nearest_tf32(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y: in bfloat16 if either is, in float16 if both are, else in PRECISION."""
    if x.dtype == tl.bfloat16 or y.dtype == tl.bfloat16:
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
    if x.dtype == tl.float16 and y.dtype == tl.float16:
        return tl.dot(x, y, acc)
    if PRECISION == "tf32":
        # the hardware would truncate, a bias that a sum of one sign keeps
        x = _nearest_tf32(x.to(tl.float32))
        y = _nearest_tf32(y.to(tl.float32))
    return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PRECISION)


@jit
def _sequence(z, length, cu_ptr):
    """(batch, first token, length) of sequence z."""
    batch = z.to(tl.int64)
    first = batch * 0
    if cu_ptr is not None:
        first = tl.load(cu_ptr + z).to(tl.int64)
        length = (tl.load(cu_ptr + z + 1) - first).to(tl.int32)
        batch = batch * 0
    return batch, first, length


@jit
def _visible(mask_ptr, stride, start, stop, BLOCK: tl.constexpr):
    """[BLOCK] bool: tokens before `stop` that the key mask, if any, shows."""
    rows = start + tl.arange(0, BLOCK)
    keep = rows < stop
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + rows.to(tl.int64) * stride, mask=keep, other=0) != 0
    return keep


@jit
def _tile(
    pointer, start, stride, keep, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_WIDTH] at (start, column), zeros beyond WIDTH and in rows not in `keep`."""
    columns = column + tl.arange(0, BLOCK_WIDTH)[None, :]
    where = (
        pointer
        + tl.cast(start, tl.int64) * stride
        + tl.arange(0, BLOCK)[:, None] * stride
        + columns
    )
    inside = keep[:, None]
    if WIDTH % BLOCK_WIDTH != 0:
        inside = inside & (columns < WIDTH)
    return tl.load(where, mask=inside, other=0.0)


@jit
def _first_slot(first, cu_ptr, CHUNK: tl.constexpr):
    """Of a sequence; packed ones need no prefix sum over their lengths."""
    return first // CHUNK if cu_ptr is not None else first


@jit(do_not_specialize=["heads", "length", "slots", "skip", "total"])
def state_kernel(
    x_ptr, y_ptr, weight_ptr, mask_ptr, state_ptr, sum_ptr, last_ptr, last_sum_ptr, cu_ptr,
    x_strides, y_strides, mask_strides, heads, length, slots, skip, total,
    WIDTH_X: tl.constexpr, WIDTH_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the states sum_t x_t y_t^T and sums sum_t weight_t x_t of one head.

    The sums over the full chunks 0 .. c go to slot c - skip, those over chunks c .. with c >= 1
    (REVERSE) to slot c - 1; in a full call the sum over everything goes to slot 0, unless it is a
    packed sequence without a full chunk. So a call has no more slots than full chunks. The sum over
    everything also goes to `last`, in float32. Heads of x and y are GROUP times those of the states
    and summed in order. Strides are of (batch, head, token); weight is [batch, heads GROUP, total].
    """
    STEPS: tl.constexpr = GROUP * (CHUNK // BLOCK_T)
    BLOCKS_X: tl.constexpr = (WIDTH_X + BLOCK_X - 1) // BLOCK_X
    BLOCKS_Y: tl.constexpr = (WIDTH_Y + BLOCK_Y - 1) // BLOCK_Y
    index = tl.program_id(0)
    y0 = index % BLOCKS_Y * BLOCK_Y
    x0 = index // BLOCKS_Y % BLOCKS_X * BLOCK_X
    index = index // (BLOCKS_X * BLOCKS_Y)
    head = (index % heads).to(tl.int64)
    z = index // heads
    batch, first, length = _sequence(z, length, cu_ptr)
    x_ptr += batch * x_strides[0] + head * GROUP * x_strides[1] + first * x_strides[2]
    y_ptr += batch * y_strides[0] + head * GROUP * y_strides[1] + first * y_strides[2]
    if mask_ptr is not None:
        mask_ptr += batch * mask_strides[0]
    slot = (batch * heads + head) * slots + _first_slot(first, cu_ptr, CHUNK)
    xs = x0 + tl.arange(0, BLOCK_X)
    ys = y0 + tl.arange(0, BLOCK_Y)
    place = xs[:, None] * WIDTH_Y + ys[None, :]
    inside = (xs < WIDTH_X)[:, None] & (ys < WIDTH_Y)[None, :]

    chunks = tl.cdiv(length, CHUNK)
    stop = chunks
    if CAUSAL and REVERSE:
        stop = chunks - 1
    elif CAUSAL and last_ptr is None:
        stop = length // CHUNK
    elif cu_ptr is not None and last_ptr is None:
        stop = chunks if length >= CHUNK else 0
    acc = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    sums = tl.zeros([BLOCK_X], tl.float32)
    for step in tl.range(0, stop * STEPS):
        chunk = step // STEPS
        if REVERSE:
            chunk = chunks - 1 - chunk
        member = tl.cast(step % STEPS // (CHUNK // BLOCK_T), tl.int64)
        start = chunk * CHUNK + step % (CHUNK // BLOCK_T) * BLOCK_T
        keep = _visible(mask_ptr, mask_strides[1], start, length, BLOCK_T)
        x = _tile(
            x_ptr + member * x_strides[1], start, x_strides[2], keep, x0, WIDTH_X, BLOCK_T, BLOCK_X
        )
        y = _tile(
            y_ptr + member * y_strides[1], start, y_strides[2], keep, y0, WIDTH_Y, BLOCK_T, BLOCK_Y
        )
        acc = _dot(tl.trans(x), y, acc, PRECISION)
        term = x.to(tl.float32)
        if weight_ptr is not None:
            line = (batch * heads + head) * GROUP + member
            where = weight_ptr + line * total + first + start + tl.arange(0, BLOCK_T)
            term = term * tl.load(where, mask=keep, other=0.0)[:, None]
        sums += tl.sum(term, 0)
        stored = (step + 1) % STEPS == 0 and (
            REVERSE or (start + BLOCK_T <= length and chunk >= skip)
        )
        if CAUSAL and stored:
            now = slot + chunk - (1 if REVERSE else skip)
            tl.store(
                state_ptr + now * (WIDTH_X * WIDTH_Y) + place,
                acc.to(state_ptr.dtype.element_ty),
                mask=inside,
            )
            if y0 == 0:
                tl.store(sum_ptr + now * WIDTH_X + xs, sums, mask=xs < WIDTH_X)
    if not CAUSAL and (cu_ptr is None or length >= CHUNK):
        tl.store(
            state_ptr + slot * (WIDTH_X * WIDTH_Y) + place,
            acc.to(state_ptr.dtype.element_ty),
            mask=inside,
        )
        if y0 == 0:
            tl.store(sum_ptr + slot * WIDTH_X + xs, sums, mask=xs < WIDTH_X)
    if last_ptr is not None:
        line = z.to(tl.int64) * heads + head
        tl.store(last_ptr + line * (WIDTH_X * WIDTH_Y) + place, acc, mask=inside)
        if y0 == 0:
            tl.store(last_sum_ptr + line * WIDTH_X + xs, sums, mask=xs < WIDTH_X)


@jit(do_not_specialize=["heads", "rows", "columns", "offset", "slots", "skip", "tiles", "total"])
def read_kernel(
    a_ptr, b_ptr, e_ptr, state_ptr, sum_ptr, delta_ptr, mask_ptr, out_ptr, norm_ptr,
    cu_rows_ptr, cu_columns_ptr, a_strides, b_strides, e_strides, mask_strides, out_strides,
    heads, rows, columns, offset, slots, skip, tiles, total, scale, eps,
    KIND: tl.constexpr, WIDTH_A: tl.constexpr, WIDTH_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE_A: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and of the width of e: "out" (with the norm), "dq", "dk" or "dv".

    `heads` counts those of the rows; rows and columns are queries and keys, or for dk and dv keys
    and queries. WHOLE_A is the padded width of a, or 0 to take it in blocks of BLOCK_A throughout.
    """
    REVERSE: tl.constexpr = KIND == "dk" or KIND == "dv"
    BLOCKS_E: tl.constexpr = (WIDTH_E + BLOCK_E - 1) // BLOCK_E
    index = tl.program_id(0)
    e0 = index % BLOCKS_E * BLOCK_E
    start = index // BLOCKS_E % tiles * BLOCK_M
    head = (index // BLOCKS_E // tiles % heads).to(tl.int64)
    z = index // BLOCKS_E // tiles // heads
    batch, first_row, rows = _sequence(z, rows, cu_rows_ptr)
    batch, first_column, columns = _sequence(z, columns, cu_columns_ptr)
    if start >= rows:
        return
    if REVERSE:
        if cu_rows_ptr is not None:
            offset = rows - columns
        column_head = head * GROUP
        line = (batch * heads + head) * slots
    else:
        if cu_rows_ptr is not None:
            offset = columns - rows
        column_head = head // GROUP
        line = (batch * (heads // GROUP) + column_head) * slots
    line += _first_slot(first_column, cu_columns_ptr, CHUNK)
    a_ptr += batch * a_strides[0] + head * a_strides[1] + first_row * a_strides[2]
    b_ptr += batch * b_strides[0] + column_head * b_strides[1] + first_column * b_strides[2]
    e_ptr += batch * e_strides[0] + column_head * e_strides[1] + first_column * e_strides[2]
    out_ptr += batch * out_strides[0] + head * out_strides[1] + first_row * out_strides[2]
    if mask_ptr is not None:
        mask_ptr += batch * mask_strides[0]

    # columns begin .. stop are visited; the state stands for all others that these rows see
    begin, stop, slot, carried = 0, 0, 0, True
    if CAUSAL and REVERSE:
        seen = tl.cdiv(tl.maximum(tl.minimum(start + BLOCK_M, rows) - 1 - offset, 1), CHUNK)
        begin = tl.maximum(start - offset, 0) // BLOCK_N * BLOCK_N
        stop = tl.minimum(seen * CHUNK, columns)
        slot = seen - 1
        carried = seen * CHUNK < columns
    elif CAUSAL:
        seen = tl.minimum(tl.maximum(start + offset + 1, 0), columns) // CHUNK
        begin = seen * CHUNK
        stop = tl.minimum(start + BLOCK_M + offset, columns)
        slot = seen - 1 - skip
        carried = seen > 0
    elif cu_columns_ptr is not None:
        carried = columns >= CHUNK
        stop = 0 if columns >= CHUNK else columns

    lines = start + tl.arange(0, BLOCK_M)
    keep = _visible(mask_ptr, mask_strides[1], start, rows, BLOCK_M) if REVERSE else lines < rows
    es = e0 + tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if KIND == "dq":
        row_delta = tl.load(
            delta_ptr + (batch * heads + head) * total + first_row + lines, mask=keep, other=0.0
        )
    if carried:
        state_ptr += (line + slot) * (WIDTH_A * WIDTH_E)
        for a0 in tl.range(0, WIDTH_A, BLOCK_A):
            a = _tile(a_ptr, start, a_strides[2], keep, a0, WIDTH_A, BLOCK_M, BLOCK_A)
            widths = a0 + tl.arange(0, BLOCK_A)
            if KIND == "dq" or KIND == "dk":
                state = tl.load(
                    state_ptr + es[:, None] * WIDTH_A + widths[None, :],
                    mask=(es < WIDTH_E)[:, None] & (widths < WIDTH_A)[None, :],
                    other=0.0,
                )
                acc = _dot(a, tl.trans(state), acc, PRECISION)
            else:
                state = tl.load(
                    state_ptr + widths[:, None] * WIDTH_E + es[None, :],
                    mask=(widths < WIDTH_A)[:, None] & (es < WIDTH_E)[None, :],
                    other=0.0,
                )
                acc = _dot(a, state, acc, PRECISION)
            if KIND == "out":
                sums = tl.load(
                    sum_ptr + (line + slot) * WIDTH_A + widths, mask=widths < WIDTH_A, other=0.0
                )
                mass += tl.sum(a.to(tl.float32) * sums[None, :], 1)
        if KIND == "dq" or KIND == "dk":
            sums = tl.load(sum_ptr + (line + slot) * WIDTH_E + es, mask=es < WIDTH_E, other=0.0)[
                None, :
            ]
            acc -= row_delta[:, None] * sums if KIND == "dq" else sums

    if CAUSAL or cu_columns_ptr is not None:
        if WHOLE_A > 0:
            a = _tile(a_ptr, start, a_strides[2], keep, 0, WIDTH_A, BLOCK_M, WHOLE_A)
        for member in tl.range(0, GROUP if REVERSE else 1):
            b_head = b_ptr + tl.cast(member, tl.int64) * b_strides[1]
            e_head = e_ptr + tl.cast(member, tl.int64) * e_strides[1]
            for n0 in tl.range(begin, stop, BLOCK_N):
                cols = n0 + tl.arange(0, BLOCK_N)
                if REVERSE:
                    shown = cols < columns
                else:
                    shown = _visible(mask_ptr, mask_strides[1], n0, columns, BLOCK_N)
                x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if WHOLE_A > 0:
                    b = _tile(b_head, n0, b_strides[2], shown, 0, WIDTH_A, BLOCK_N, WHOLE_A)
                    x = _dot(a, tl.trans(b), x, PRECISION)
                else:
                    for a0 in tl.range(0, WIDTH_A, BLOCK_A):
                        a = _tile(a_ptr, start, a_strides[2], keep, a0, WIDTH_A, BLOCK_M, BLOCK_A)
                        b = _tile(b_head, n0, b_strides[2], shown, a0, WIDTH_A, BLOCK_N, BLOCK_A)
                        x = _dot(a, tl.trans(b), x, PRECISION)
                if KIND == "dq":
                    x -= row_delta[:, None]
                if KIND == "dk":
                    where = (batch * heads + head) * GROUP + member
                    where = delta_ptr + where * total + first_column + cols
                    x -= tl.load(where, mask=shown, other=0.0)[None, :]
                if CAUSAL and REVERSE:
                    x = tl.where(lines[:, None] <= cols[None, :] + offset, x, 0.0)
                elif CAUSAL:
                    x = tl.where(cols[None, :] <= lines[:, None] + offset, x, 0.0)
                if KIND == "out":
                    mass += tl.sum(x, 1)
                e = _tile(e_head, n0, e_strides[2], shown, e0, WIDTH_E, BLOCK_N, BLOCK_E)
                acc = _dot(x, e, acc, PRECISION)

    if KIND == "out":
        mass *= scale
        if e0 == 0:
            where = norm_ptr + (batch * heads + head) * total + first_row + lines
            tl.store(where, mass, mask=keep)
        acc *= (scale / tl.maximum(mass, eps))[:, None]
    else:
        acc = tl.where(keep[:, None], acc * scale, 0.0)
    place = (
        tl.cast(start, tl.int64) * out_strides[2] + tl.arange(0, BLOCK_M)[:, None] * out_strides[2]
    )
    tl.store(
        out_ptr + place + es[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(lines < rows)[:, None] & (es < WIDTH_E)[None, :],
    )


@jit(do_not_specialize=["heads", "rows", "tiles"])
def delta_kernel(
    grad_ptr, out_ptr, norm_ptr, scaled_ptr, delta_ptr, grad_strides, out_strides, heads, rows,
    tiles, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """g = d_out / max(norm, eps) as `scaled`, and delta = g . out, 0 where the norm is clamped."""
    index = tl.program_id(0)
    start = index % tiles * BLOCK_M
    line = (index // tiles).to(tl.int64)
    batch, head = line // heads, line % heads
    grad_ptr += batch * grad_strides[0] + head * grad_strides[1]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    lines = start + tl.arange(0, BLOCK_M)
    keep = lines < rows
    norm = tl.load(norm_ptr + line * rows + lines, mask=keep, other=1.0)
    grad = _tile(grad_ptr, start, grad_strides[2], keep, 0, WIDTH, BLOCK_M, BLOCK_WIDTH)
    out = _tile(out_ptr, start, out_strides[2], keep, 0, WIDTH, BLOCK_M, BLOCK_WIDTH)
    # rounded first, so that delta and g . v of the other kernels cancel where every v is the same
    g = (grad.to(tl.float32) / tl.maximum(norm, eps)[:, None]).to(scaled_ptr.dtype.element_ty)
    delta = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + line * rows + lines, tl.where(norm >= eps, delta, 0.0), mask=keep)
    columns = tl.arange(0, BLOCK_WIDTH)[None, :]
    place = line * rows * WIDTH + lines.to(tl.int64)[:, None] * WIDTH + columns
    tl.store(scaled_ptr + place, g, mask=keep[:, None] & (columns < WIDTH))
