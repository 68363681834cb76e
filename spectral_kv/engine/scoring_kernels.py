"""Triton kernels of a pass over the keys of all layers: filters, energies, norms, and the kept rows."""

import triton
import triton.language as tl


@triton.jit
def _unrotated(base, t, cos, sin, D: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of keys at `t` before their rotation, float32 `[tokens, D / 2]`."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    a = tl.load(base + t[:, None] * D + d[None, :]).to(tl.float32)
    b = tl.load(base + t[:, None] * D + HALF + d[None, :]).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def filter_energies(addresses, cos_ptr, sin_ptr, matrices, kinds, starts, places, energy_ptr, norm_ptr, tokens,
                    energies, heads, WINDOW: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
                    PAIR: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of a plan, of one KV head, or of a pair of them that share the matrix."""
    block = tl.program_id(0)
    layer = tl.program_id(1)
    head = tl.program_id(2) * PAIR
    HALF: tl.constexpr = D // 2
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    base = keys + head.to(tl.int64) * tokens * D
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
        cos = tl.load(cos_ptr + t[:, None] * HALF + d[None, :])
        sin = tl.load(sin_ptr + t[:, None] * HALF + d[None, :])
        w = tl.load(matrices + (kind * TILE + c[:, None]) * WINDOW + j + tl.arange(0, STEP)[None, :])
        a, b = _unrotated(base, t, cos, sin, D, DTYPE)
        a0 = tl.dot(w, a, a0, input_precision=PRECISION)
        b0 = tl.dot(w, b, b0, input_precision=PRECISION)
        norm = tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1))
        inside = (seen >= 0) & (seen < tokens)
        tl.store(norm_ptr + row * tokens + seen, norm, mask=inside)
        if PAIR == 2:
            a, b = _unrotated(base + tokens * D, t, cos, sin, D, DTYPE)
            a1 = tl.dot(w, a, a1, input_precision=PRECISION)
            b1 = tl.dot(w, b, b1, input_precision=PRECISION)
            norm = tl.sqrt(tl.sum(a * a, 1) + tl.sum(b * b, 1))
            tl.store(norm_ptr + (row + 1) * tokens + seen, norm, mask=inside)
    place = tl.load(places + block * TILE + c)
    energy = tl.sum(a0 * a0, 1) + tl.sum(b0 * b0, 1)
    tl.store(energy_ptr + row * energies + place, energy, mask=place >= 0)
    if PAIR == 2:
        energy = tl.sum(a1 * a1, 1) + tl.sum(b1 * b1, 1)
        tl.store(energy_ptr + (row + 1) * energies + place, energy, mask=place >= 0)


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
