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
def take_rows(key_addresses, value_addresses, index_ptr, key_out, value_out, tokens, kept, heads,
              D: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Kept rows of keys and values of all layers, from where they lie."""
    row = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    index = tl.load(index_ptr + row * kept + r, mask=r < kept, other=0).to(tl.int64)
    ok = (r < kept)[:, None]
    source = ((row % heads) * tokens + index)[:, None] * D + d[None, :]
    target = (row * kept + r)[:, None] * D + d[None, :]
    keys = tl.multiple_of(tl.load(key_addresses + row // heads).to(tl.pointer_type(DTYPE)), 16)
    values = tl.multiple_of(tl.load(value_addresses + row // heads).to(tl.pointer_type(DTYPE)), 16)
    tl.store(key_out + target, tl.load(keys + source, mask=ok), mask=ok)
    tl.store(value_out + target, tl.load(values + source, mask=ok), mask=ok)
