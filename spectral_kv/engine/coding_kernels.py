"""Triton kernels of a transform coder: keys and values of a group of layers as rows, and components as packed codes."""

import triton
import triton.language as tl

CELLS = tl.constexpr(128)
RANGE = tl.constexpr(6)


@triton.jit
def _halves(x, out, column, width, ok):
    """Numbers as the sum of two of 16 bits, once beside the matrix's high halves and once more beside its low ones."""
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + column, high, mask=ok)
    tl.store(out + width + column, low, mask=ok)
    tl.store(out + 2 * width + column, high, mask=ok)


@triton.jit(do_not_specialize=["first", "tokens"])
def centred_rows(addresses, cos_ptr, sin_ptr, mean_ptr, out_ptr, first, tokens, key_head, key_token, value_head,
                 value_token, LAYERS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
                 DTYPE: tl.constexpr):  # fmt: skip
    """Keys before RoPE and values of a head less their means, from token `first` on, `[tokens, 3 * columns]`."""
    head = tl.program_id(1)
    layer, own = head // HEADS, (head % HEADS).to(tl.int64)
    HALF: tl.constexpr = D // 2
    WIDTH: tl.constexpr = 2 * LAYERS * HEADS * D
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = (t < tokens)[:, None]
    at, d, h = first + t, tl.arange(0, D)[None, :], tl.arange(0, HALF)[None, :]
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16) + own * key_head
    a = tl.load(keys + at[:, None] * key_token + h, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(keys + at[:, None] * key_token + HALF + h, mask=ok, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + at[:, None] * HALF + h, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + at[:, None] * HALF + h, mask=ok, other=0.0)
    out, column = out_ptr + t[:, None] * (3 * WIDTH), head * D
    _halves(a * cos - b * sin - tl.load(mean_ptr + column + h), out, column + h, WIDTH, ok)
    _halves(b * cos + a * sin - tl.load(mean_ptr + column + HALF + h), out, column + HALF + h, WIDTH, ok)
    values = tl.multiple_of(tl.load(addresses + LAYERS + layer).to(tl.pointer_type(DTYPE)), 16) + own * value_head
    v = tl.load(values + at[:, None] * value_token + d, mask=ok, other=0.0).to(tl.float32)
    column += LAYERS * HEADS * D
    _halves(v - tl.load(mean_ptr + column + d), out, column + d, WIDTH, ok)


@triton.jit
def _plane(rows, out, table, cell, ok, width, PARTS: tl.constexpr, SHIFT: tl.constexpr, BJ: tl.constexpr):
    """Bits `SHIFT` and up of codes, packed so that those of a byte lie a part of the class apart."""
    BITS: tl.constexpr = 8 // PARTS
    step = width // PARTS
    for first in range(0, step, BJ):
        j = first + tl.arange(0, BJ)[None, :]
        there = ok & (j < step)
        byte = tl.zeros(there.shape, tl.int32)
        for part in tl.static_range(PARTS):
            y = tl.load(rows + part * step + j, mask=there, other=0.0)
            at = tl.minimum(tl.maximum(tl.div_rn(y, cell) + RANGE * CELLS, 0.0), 2.0 * RANGE * CELLS - 1)
            code = tl.load(table + at.to(tl.int32)).to(tl.int32)
            byte |= ((code >> SHIFT) & ((1 << BITS) - 1)) << (part * BITS)
        tl.store(out + j, byte.to(tl.uint8), mask=there)


@triton.jit(do_not_specialize=["tokens", "used", "classes", "size"])
def packed_codes(y_ptr, classes_ptr, cells_ptr, tables_ptr, packed_ptr, gains_ptr, tokens, used, classes, size,
                 BT: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """Scales `[tokens, classes]` and codes `[tokens, size]` of one class of components `[tokens, used]`.

    Of each class there are its bits, its first component, its width, and its first byte.
    """
    index = tl.program_id(1)
    bits, start, width, place = (
        tl.load(classes_ptr + 4 * index), tl.load(classes_ptr + 4 * index + 1),
        tl.load(classes_ptr + 4 * index + 2), tl.load(classes_ptr + 4 * index + 3),
    )  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = (t < tokens)[:, None]
    rows = y_ptr + t[:, None] * used + start
    squares = tl.zeros([BT, 4 * BJ], tl.float32)
    for first in range(0, width, 4 * BJ):
        j = first + tl.arange(0, 4 * BJ)[None, :]
        y = tl.load(rows + j, mask=ok & (j < width), other=0.0)
        squares += y * y
    power = tl.maximum(tl.div_rn(tl.sum(squares, 1), width.to(tl.float32)), 1e-30)
    gain = tl.minimum(tl.maximum(tl.floor(8 * tl.log2(power) + 0.5) + 128, 0.0), 255.0).to(tl.int32)
    tl.store(gains_ptr + t * classes + index, gain.to(tl.uint8), mask=t < tokens)
    cell = tl.load(cells_ptr + gain)[:, None]
    table = tables_ptr + index * (2 * RANGE * CELLS)
    out = packed_ptr + t[:, None] * size + place
    if bits == 1:
        _plane(rows, out, table, cell, ok, width, 8, 0, BJ)
    elif bits == 2:
        _plane(rows, out, table, cell, ok, width, 4, 0, BJ)
    elif bits == 3:
        _plane(rows, out, table, cell, ok, width, 4, 0, BJ)
        _plane(rows, out + width // 4, table, cell, ok, width, 8, 2, BJ)
    elif bits == 4:
        _plane(rows, out, table, cell, ok, width, 2, 0, BJ)
    elif bits == 5:
        _plane(rows, out, table, cell, ok, width, 2, 0, BJ)
        _plane(rows, out + width // 2, table, cell, ok, width, 8, 4, BJ)
    else:
        _plane(rows, out, table, cell, ok, width, 2, 0, BJ)
        _plane(rows, out + width // 2, table, cell, ok, width, 4, 4, BJ)
