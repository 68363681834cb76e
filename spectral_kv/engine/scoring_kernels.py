"""Triton kernels of passes over the keys of all layers: filters, energies, norms, and the kept rows."""

import triton
import triton.language as tl


@triton.jit
def _signal(base, t, cos, sin, TURN: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of the signal at `t`, before its rotation where it has one, float32 `[tokens, D / 2]`."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    a = tl.load(base + t[:, None] * D + d[None, :]).to(tl.float32)
    b = tl.load(base + t[:, None] * D + HALF + d[None, :]).to(tl.float32)
    if TURN:
        return a * cos - b * sin, b * cos + a * sin
    else:
        return a, b


@triton.jit
def _leave(a, b, row, place, energy_ptr, energies, filtered_ptr, WRITE: tl.constexpr, D: tl.constexpr):
    """Energies of filters, and what they left of the signal."""
    tl.store(energy_ptr + row * energies + place, tl.sum(a * a, 1) + tl.sum(b * b, 1), mask=place >= 0)
    if WRITE:
        HALF: tl.constexpr = D // 2
        target = (row * energies + place)[:, None] * D + tl.arange(0, HALF)[None, :]
        tl.store(filtered_ptr + target, a, mask=(place >= 0)[:, None])
        tl.store(filtered_ptr + target + HALF, b, mask=(place >= 0)[:, None])


@triton.jit
def filter_energies(addresses, cos_ptr, sin_ptr, matrices, kinds, starts, places, energy_ptr, norm_ptr, filtered_ptr,
                    tokens, stride, energies, heads, WINDOW: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
                    D: tl.constexpr, PAIR: tl.constexpr, TURN: tl.constexpr, NORMS: tl.constexpr, WRITE: tl.constexpr,
                    DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of a plan, of one KV head, or of a pair of them that share the matrix.

    Heads lie `stride` tokens apart. `TURN`: the signal is rotated; `NORMS`: its norms are wanted; `WRITE`: and what
    the filters leave of it, one after another where their energies lie.
    """
    block = tl.program_id(0)
    layer = tl.program_id(1)
    head = tl.program_id(2) * PAIR
    HALF: tl.constexpr = D // 2
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    base = keys + head.to(tl.int64) * stride * D
    kind = tl.load(kinds + block)
    start = tl.load(starts + block)
    c = tl.arange(0, TILE)
    d = tl.arange(0, HALF)
    a0 = tl.zeros([TILE, HALF], tl.float32)
    b0 = tl.zeros([TILE, HALF], tl.float32)
    a1 = tl.zeros([TILE, HALF], tl.float32)
    b1 = tl.zeros([TILE, HALF], tl.float32)
    row = (layer * heads + head).to(tl.int64)
    for j in range(0, WINDOW, STEP):
        seen = start + j + tl.arange(0, STEP)
        t = tl.abs(seen)
        t = tl.where(t >= tokens, 2 * tokens - 2 - t, t)
        t = tl.abs(t)
        if TURN:
            cos = tl.load(cos_ptr + t[:, None] * HALF + d[None, :])
            sin = tl.load(sin_ptr + t[:, None] * HALF + d[None, :])
        else:
            cos = 1.0
            sin = 0.0
        w = tl.load(matrices + (kind * TILE + c[:, None]) * WINDOW + j + tl.arange(0, STEP)[None, :])
        inside = (seen >= 0) & (seen < tokens)
        a, b = _signal(base, t, cos, sin, TURN, D, DTYPE)
        a0 = tl.dot(w, a, a0, input_precision=PRECISION)
        b0 = tl.dot(w, b, b0, input_precision=PRECISION)
        if NORMS:
            tl.store(norm_ptr + row * tokens + seen, tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1)), mask=inside)
        if PAIR == 2:
            a, b = _signal(base + stride * D, t, cos, sin, TURN, D, DTYPE)
            a1 = tl.dot(w, a, a1, input_precision=PRECISION)
            b1 = tl.dot(w, b, b1, input_precision=PRECISION)
            if NORMS:
                norm = tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1))
                tl.store(norm_ptr + (row + 1) * tokens + seen, norm, mask=inside)
    place = tl.load(places + block * TILE + c)
    _leave(a0, b0, row, place, energy_ptr, energies, filtered_ptr, WRITE, D)
    if PAIR == 2:
        _leave(a1, b1, row + 1, place, energy_ptr, energies, filtered_ptr, WRITE, D)


@triton.jit
def _around(seen, tokens):
    """Tokens, those beyond an end reflected."""
    t = tl.abs(seen)
    return tl.abs(tl.where(t >= tokens, 2 * tokens - 2 - t, t))


@triton.jit
def _folded(base, left, right, cos_left, sin_left, cos_right, sin_right, even, odd, ea, eb, oa, ob,
            D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Numbers of the smooth part, with what mirrored tokens at `left` and `right` add to them."""
    a, b = _signal(base, left, cos_left, sin_left, True, D, DTYPE)
    c, d = _signal(base, right, cos_right, sin_right, True, D, DTYPE)
    ea = tl.dot(even, a + c, ea, input_precision=PRECISION)
    eb = tl.dot(even, b + d, eb, input_precision=PRECISION)
    oa = tl.dot(odd, a - c, oa, input_precision=PRECISION)
    ob = tl.dot(odd, b - d, ob, input_precision=PRECISION)
    return ea, eb, oa, ob


@triton.jit
def _unsmooth(base, t, smooth_a, smooth_b, cos, sin, out_ptr, norm_ptr, tokens, D: tl.constexpr, DTYPE: tl.constexpr):
    """Norms of tokens, with and without their smooth part."""
    a, b = _signal(base, tl.minimum(t, tokens - 1), cos, sin, True, D, DTYPE)
    tl.store(norm_ptr + t, tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1)), mask=t < tokens)
    a -= smooth_a
    b -= smooth_b
    tl.store(out_ptr + t, tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1)), mask=t < tokens)


@triton.jit
def _both_halves(base, first, last, even, odd, ea, eb, oa, ob, cos_first, sin_first, cos_last, sin_last, out_ptr,
                 norm_ptr, tokens, D: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What is left of the tokens of a tile: of its first half, and of its second, the last token first."""
    sum_a = tl.dot(even, ea, input_precision=PRECISION)
    sum_b = tl.dot(even, eb, input_precision=PRECISION)
    difference_a = tl.dot(odd, oa, input_precision=PRECISION)
    difference_b = tl.dot(odd, ob, input_precision=PRECISION)
    _unsmooth(base, first, sum_a + difference_a, sum_b + difference_b, cos_first, sin_first, out_ptr, norm_ptr, tokens,
              D, DTYPE)  # fmt: skip
    _unsmooth(base, last, sum_a - difference_a, sum_b - difference_b, cos_last, sin_last, out_ptr, norm_ptr, tokens,
              D, DTYPE)  # fmt: skip


@triton.jit
def without_smooth(addresses, cos_ptr, sin_ptr, down, up, out_ptr, norm_ptr, tokens, heads, HALF_WINDOW: tl.constexpr,
                   HALF_TILE: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
                   PAIR: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Norms of a tile of tokens before their rotation, and of what a smooth part leaves of them.

    Of one KV head, or of a pair of them that share the matrices.
    """
    tile = tl.program_id(0) * 2 * HALF_TILE
    layer = tl.program_id(1)
    head = tl.program_id(2) * PAIR
    HALF: tl.constexpr = D // 2
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    base = keys + head.to(tl.int64) * tokens * D
    row = (layer * heads + head).to(tl.int64)
    r = tl.arange(0, RANK)
    d = tl.arange(0, HALF)
    ea0 = tl.zeros([RANK, HALF], tl.float32)
    eb0 = tl.zeros([RANK, HALF], tl.float32)
    oa0 = tl.zeros([RANK, HALF], tl.float32)
    ob0 = tl.zeros([RANK, HALF], tl.float32)
    ea1 = tl.zeros([RANK, HALF], tl.float32)
    eb1 = tl.zeros([RANK, HALF], tl.float32)
    oa1 = tl.zeros([RANK, HALF], tl.float32)
    ob1 = tl.zeros([RANK, HALF], tl.float32)
    for j in range(0, HALF_WINDOW, STEP):
        i = j + tl.arange(0, STEP)
        left = _around(tile + HALF_TILE - HALF_WINDOW + i, tokens)
        right = _around(tile + HALF_TILE + HALF_WINDOW - 1 - i, tokens)
        cos_left = tl.load(cos_ptr + left[:, None] * HALF + d[None, :])
        sin_left = tl.load(sin_ptr + left[:, None] * HALF + d[None, :])
        cos_right = tl.load(cos_ptr + right[:, None] * HALF + d[None, :])
        sin_right = tl.load(sin_ptr + right[:, None] * HALF + d[None, :])
        even = tl.load(down + r[:, None] * HALF_WINDOW + i[None, :])
        odd = tl.load(down + (RANK + r[:, None]) * HALF_WINDOW + i[None, :])
        ea0, eb0, oa0, ob0 = _folded(base, left, right, cos_left, sin_left, cos_right, sin_right, even, odd, ea0, eb0,
                                     oa0, ob0, D, DTYPE, PRECISION)  # fmt: skip
        if PAIR == 2:
            ea1, eb1, oa1, ob1 = _folded(base + tokens * D, left, right, cos_left, sin_left, cos_right, sin_right, even,
                                         odd, ea1, eb1, oa1, ob1, D, DTYPE, PRECISION)  # fmt: skip
    h = tl.arange(0, HALF_TILE)
    first = tile + h
    last = tile + 2 * HALF_TILE - 1 - h
    even = tl.load(up + h[:, None] * RANK + r[None, :])
    odd = tl.load(up + (HALF_TILE + h[:, None]) * RANK + r[None, :])
    near = tl.minimum(first, tokens - 1)
    far = tl.minimum(last, tokens - 1)
    cos_first = tl.load(cos_ptr + near[:, None] * HALF + d[None, :])
    sin_first = tl.load(sin_ptr + near[:, None] * HALF + d[None, :])
    cos_last = tl.load(cos_ptr + far[:, None] * HALF + d[None, :])
    sin_last = tl.load(sin_ptr + far[:, None] * HALF + d[None, :])
    _both_halves(base, first, last, even, odd, ea0, eb0, oa0, ob0, cos_first, sin_first, cos_last, sin_last,
                 out_ptr + row * tokens, norm_ptr + row * tokens, tokens, D, DTYPE, PRECISION)  # fmt: skip
    if PAIR == 2:
        _both_halves(base + tokens * D, first, last, even, odd, ea1, eb1, oa1, ob1, cos_first, sin_first, cos_last,
                     sin_last, out_ptr + (row + 1) * tokens, norm_ptr + (row + 1) * tokens, tokens, D, DTYPE,
                     PRECISION)  # fmt: skip


@triton.jit
def unrotated_rows(addresses, cos_ptr, sin_ptr, out_ptr, tokens, heads, D: tl.constexpr, BT: tl.constexpr,
                   DTYPE: tl.constexpr):  # fmt: skip
    """Keys of all layers before their rotation, float32, one head after another."""
    row = tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, HALF)
    ok = (t < tokens)[:, None]
    keys = tl.multiple_of(tl.load(addresses + row // heads).to(tl.pointer_type(DTYPE)), 16)
    near = tl.minimum(t, tokens - 1)
    cos = tl.load(cos_ptr + near[:, None] * HALF + d[None, :])
    sin = tl.load(sin_ptr + near[:, None] * HALF + d[None, :])
    a, b = _signal(keys + (row % heads) * tokens * D, near, cos, sin, True, D, DTYPE)
    target = (row * tokens + t)[:, None] * D + d[None, :]
    tl.store(out_ptr + target, a, mask=ok)
    tl.store(out_ptr + target + HALF, b, mask=ok)


@triton.jit
def to_tokens(energy_ptr, index_ptr, gain_ptr, out_ptr, tokens, energies, rows,
              K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Deviations of a tile of tokens, of all rows in turn: their indices and gains are read once."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, KP)
    ok = (t < tokens)[:, None] & (k < K)[None, :]
    index = tl.load(index_ptr + t[:, None] * K + k[None, :], mask=ok, other=0)
    gain = tl.load(gain_ptr + t[:, None] * K + k[None, :], mask=ok, other=0.0)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        energy = tl.load(energy_ptr + row * energies + index, mask=ok, other=0.0)
        tl.store(out_ptr + row * tokens + t, tl.sqrt(tl.sum(energy * gain, 1)), mask=t < tokens)


@triton.jit
def take_rows(addresses, index_ptr, tokens, kept, layers, heads, D: tl.constexpr, BT: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """Kept rows of keys and values of all layers, from where they lie, to the last of the addresses."""
    row = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    index = tl.load(index_ptr + row * kept + r, mask=r < kept, other=0).to(tl.int64)
    ok = (r < kept)[:, None]
    layer = row // heads
    source = ((row % heads) * tokens + index)[:, None] * D + d[None, :]
    target = (row * kept + r)[:, None] * D + d[None, :]
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    values = tl.multiple_of(tl.load(addresses + layers + layer).to(tl.pointer_type(DTYPE)), 16)
    out = tl.multiple_of(tl.load(addresses + 2 * layers).to(tl.pointer_type(DTYPE)), 16)
    tl.store(out + target, tl.load(keys + source, mask=ok), mask=ok)
    target = ((layers * heads + row) * kept + r)[:, None] * D + d[None, :]
    tl.store(out + target, tl.load(values + source, mask=ok), mask=ok)
