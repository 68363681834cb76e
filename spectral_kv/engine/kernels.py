"""Triton kernels: attention of one new token a sequence to cached rows, dense and in TurboQuant codes.

Rows are cut into splits, one program each for every sequence and KV head; the query heads of a group share a tile of
keys. A split leaves its normalised result and the logarithm of its sum of weights; a merge joins the splits by them.
How many rows there are is read on the device, for every sequence and head, so that a captured launch stays right while
the cache grows. The program of the last split writes the new row, which nobody reads back in the same launch.
"""

import triton
import triton.language as tl

from spectral_kv.engine.lookup import PAIRS, PARTS, ptx

LOG2E = 1.4426950408889634

C4_0, C4_1 = (tl.constexpr(ptx(4, part)) for part in range(2))
C2_0, C2_1, C2_2, C2_3 = (tl.constexpr(ptx(2, part)) for part in range(PARTS[2]))
C3_0, C3_1 = (tl.constexpr(ptx(3, part)) for part in range(2))
C3_PAIRS = tl.constexpr(PAIRS)


@triton.jit
def _partial(
    acc, total, part_ptr, row, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, W: tl.constexpr
):
    """Channels `D0` to `D0 + W` of the normalised result of a split."""
    g = tl.arange(0, GP)
    d = D0 + tl.arange(0, W)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(part_ptr + (row * G + g)[:, None] * D + d[None, :], acc / safe[:, None], mask=(g < G)[:, None])


@triton.jit
def _weight(top, total, lse_ptr, row, G: tl.constexpr, GP: tl.constexpr):
    """Binary logarithm of the sum of weights of a split, minus infinity where it has no rows."""
    g = tl.arange(0, GP)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(lse_ptr + row * G + g, tl.where(total > 0, top + tl.log2(safe), -float("inf")), mask=g < G)


@triton.jit
def _dense_rows(q, keys, values, start, stop, top, total, acc, scale, D: tl.constexpr, BT: tl.constexpr):
    """Online softmax over rows `start` to `stop`, in the dtype of `q`."""
    d = tl.arange(0, D)
    for t in range(start, stop, BT):
        r = t + tl.arange(0, BT)
        ok = r < stop
        k = tl.load(keys + r[None, :] * D + d[:, None], mask=ok[None, :], other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        s = tl.where(ok[None, :], s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + r[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, acc


@triton.jit
def _new_row(q, new_k, new_v, keys, values, n, scale, top, total, acc, bh, D: tl.constexpr):
    """Write the new row behind the `n` there are, and attend to it."""
    d = tl.arange(0, D)
    k = tl.load(new_k + bh * D + d).to(keys.dtype.element_ty)
    v = tl.load(new_v + bh * D + d).to(values.dtype.element_ty)
    tl.store(keys + n.to(tl.int64) * D + d, k)
    tl.store(values + n.to(tl.int64) * D + d, v)
    top = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    return top, total + 1.0, acc + v.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["capacity", "splits"])
def dense_split(q_ptr, new_k, new_v, k_ptr, v_ptr, n_ptr, part_ptr, lse_ptr, capacity, scale, splits,
                G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    n = tl.load(n_ptr + bh).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(n, splits), BT) * BT
    start = split * chunk
    stop = tl.minimum(start + chunk, n)
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    keys = k_ptr + bh * capacity * D
    values = v_ptr + bh * capacity * D
    q = tl.load(q_ptr + (bh * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None], other=0.0)
    if q_ptr.dtype.element_ty != tl.float32:  # queries of a float32 model stay what they are beside narrower keys
        q = q.to(k_ptr.dtype.element_ty)
    top = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    if split == splits - 1:
        top, total, acc = _new_row(q, new_k, new_v, keys, values, n, scale, top, total, acc, bh, D)
    top, total, acc = _dense_rows(q, keys, values, start, stop, top, total, acc, scale, D, BT)
    row = bh * splits + split
    _partial(acc, total, part_ptr, row, G, GP, D, 0, D)
    _weight(top, total, lse_ptr, row, G, GP)


@triton.jit(do_not_specialize=["splits"])
def dense_merge(part_ptr, lse_ptr, out_ptr, splits, G: tl.constexpr, D: tl.constexpr, SP: tl.constexpr):
    """One query head: its `splits` partial results `[bh, splits, G, D]`, weighted."""
    head = tl.program_id(0).to(tl.int64)
    bh = head // G
    g = head % G
    s = tl.arange(0, SP)
    d = tl.arange(0, D)
    lse = tl.load(lse_ptr + (bh * splits + s) * G + g, mask=s < splits, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(
        part_ptr + ((bh * splits + s) * G + g)[:, None] * D + d[None, :], mask=(s < splits)[:, None], other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + head * D + d, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _tabled(codes, table, WIDE: tl.constexpr):
    """Centroids by a table in memory: exact, slow, and what Triton's interpreter can run."""
    c = tl.load(table + codes.to(tl.int32))
    return c if WIDE else c.to(tl.float16)


@triton.jit
def _looked_up(x, BLOCK: tl.constexpr):
    """Unary and pure, so that Triton moves changes of layout in front of it, where a code is 8 bits and not 16."""
    return tl.inline_asm_elementwise(BLOCK, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def _centroids(x, table, BITS: tl.constexpr, PART: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr):
    """Centroids of one part of the codes in bytes `x`; of 3-bit codes two parts in a byte of `_pairs`."""
    if BITS == 4:
        if PTX:
            return _looked_up(x, C4_0 if PART == 0 else C4_1)
        else:
            return _tabled((x >> (4 * PART)) & 15, table, WIDE)
    elif BITS == 2:
        if PTX:
            if PART < 2:
                return _looked_up(x, C2_0 if PART == 0 else C2_1)
            else:
                return _looked_up(x, C2_2 if PART == 2 else C2_3)
        else:
            return _tabled((x >> (2 * PART)) & 3, table, WIDE)
    else:
        LOCAL: tl.constexpr = PART % 2
        if PTX:
            return _looked_up(x, C3_0 if LOCAL == 0 else C3_1)
        else:
            return _tabled(((x >> (2 * LOCAL)) & 3) | (((x >> (4 + 2 * LOCAL)) & 1) << 2), table, WIDE)


@triton.jit
def _pairs(x, y, PTX: tl.constexpr):
    """Low plane `x` and the matching bits of the high plane `y` of 3-bit codes as bytes of two codes each."""
    if PTX:
        return tl.inline_asm_elementwise(
            C3_PAIRS, "=r,=r,r,r", [x, y], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    else:
        return (x & 15) | ((y << 4) & 0x50), (x >> 4) | (y & 0x50)


@triton.jit
def _high_plane(codes, r, ok, D: tl.constexpr, CB: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """Bits of the high plane of 3-bit codes, one byte for every byte of the low plane.

    Byte j of the high plane holds one bit each of channels j, j + D/8, ..., the low plane two bits each of channels
    w, w + D/4, ...: the second half of the low bytes finds its bits one place higher.
    """
    W: tl.constexpr = D // 4
    w = tl.arange(0, W)
    up = w // (D // 8)
    if ROWS_FIRST:
        y = tl.load(codes + r[:, None] * CB + W + (w % (D // 8))[None, :], mask=ok[:, None], other=0)
        return y >> up.to(tl.uint8)[None, :]
    else:
        y = tl.load(codes + r[None, :] * CB + W + (w % (D // 8))[:, None], mask=ok[None, :], other=0)
        return y >> up.to(tl.uint8)[:, None]


@triton.jit
def _logits(
    q0, q1, q2, q3, codes, table, r, ok, D: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr
):
    """Products of rotated queries with centroids, `[GP, BT]`."""
    W: tl.constexpr = D // 2 if BITS == 4 else D // 4
    CB: tl.constexpr = D * BITS // 8
    w = tl.arange(0, W)
    x = tl.load(codes + r[None, :] * CB + w[:, None], mask=ok[None, :], other=0)
    if BITS == 4:
        s = tl.dot(q0, _centroids(x, table, BITS, 0, PTX, WIDE), input_precision="ieee")
        return tl.dot(q1, _centroids(x, table, BITS, 1, PTX, WIDE), s, input_precision="ieee")
    elif BITS == 2:
        s = tl.dot(q0, _centroids(x, table, BITS, 0, PTX, WIDE), input_precision="ieee")
        s = tl.dot(q1, _centroids(x, table, BITS, 1, PTX, WIDE), s, input_precision="ieee")
        s = tl.dot(q2, _centroids(x, table, BITS, 2, PTX, WIDE), s, input_precision="ieee")
        return tl.dot(q3, _centroids(x, table, BITS, 3, PTX, WIDE), s, input_precision="ieee")
    else:
        a, b = _pairs(x, _high_plane(codes, r, ok, D, CB, False), PTX)
        s = tl.dot(q0, _centroids(a, table, BITS, 0, PTX, WIDE), input_precision="ieee")
        s = tl.dot(q1, _centroids(a, table, BITS, 1, PTX, WIDE), s, input_precision="ieee")
        s = tl.dot(q2, _centroids(b, table, BITS, 2, PTX, WIDE), s, input_precision="ieee")
        return tl.dot(q3, _centroids(b, table, BITS, 3, PTX, WIDE), s, input_precision="ieee")


@triton.jit
def _rotated(q, rotation, scale, D: tl.constexpr, D0: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Channels `D0` to `D0 + W` of rotated queries, times `scale`."""
    d = tl.arange(0, D)
    columns = tl.load(rotation + d[:, None] * D + D0 + tl.arange(0, W)[None, :])
    if WIDE:
        return tl.dot(q, columns, input_precision="ieee") * scale
    else:
        return (tl.dot(q.to(tl.float16), columns.to(tl.float16)) * scale).to(tl.float16)


@triton.jit(do_not_specialize=["capacity", "dense_capacity", "coded_splits"])
def coded_split(q_ptr, new_k, new_v, k_codes, k_scales, v_codes, v_scales, mean_ptr, rotation, k_table, v_table,
                coded_ptr, k_ptr, v_ptr, n_ptr, part_ptr, lse_ptr, capacity, dense_capacity, scale, coded_splits,
                G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
                BT: tl.constexpr, BD: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Splits below `coded_splits` take the coded rows, one more the exact ones and the new one."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    row = bh * (coded_splits + 1) + split
    g = tl.arange(0, GP)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + (bh * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None], other=0.0)
    top = tl.full([GP], -1e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    if split == coded_splits:
        keys = k_ptr + bh * dense_capacity * D
        values = v_ptr + bh * dense_capacity * D
        n = tl.load(n_ptr + bh).to(tl.int32)
        acc = tl.zeros([GP, D], tl.float32)
        qd = q
        if not WIDE:
            qd = q.to(k_ptr.dtype.element_ty)
        top, total, acc = _new_row(qd, new_k, new_v, keys, values, n, scale, top, total, acc, bh, D)
        top, total, acc = _dense_rows(qd, keys, values, 0, n, top, total, acc, scale, D, BD)
        _partial(acc, total, part_ptr, row, G, GP, D, 0, D)
        _weight(top, total, lse_ptr, row, G, GP)
    else:
        n = tl.load(coded_ptr + bh).to(tl.int32)
        chunk = tl.cdiv(tl.cdiv(n, coded_splits), BT) * BT
        start = split * chunk
        stop = tl.minimum(start + chunk, n)
        KW: tl.constexpr = D // 2 if KB == 4 else D // 4
        VW: tl.constexpr = D // 2 if VB == 4 else D // 4
        mean = tl.load(mean_ptr + bh * D + d).to(tl.float32)
        shift = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale
        qw = q.to(tl.float32) if WIDE else q.to(tl.float16)
        q0 = _rotated(qw, rotation, scale, D, 0, KW, WIDE)
        q1 = _rotated(qw, rotation, scale, D, KW, KW, WIDE)
        if KB == 4:
            q2 = q0
            q3 = q1
        else:
            q2 = _rotated(qw, rotation, scale, D, 2 * KW, KW, WIDE)
            q3 = _rotated(qw, rotation, scale, D, 3 * KW, KW, WIDE)
        a0 = tl.zeros([GP, VW], tl.float32)
        a1 = tl.zeros([GP, VW], tl.float32)
        a2 = tl.zeros([GP, VW], tl.float32)
        a3 = tl.zeros([GP, VW], tl.float32)
        kc = k_codes + bh * capacity * (D * KB // 8)
        vc = v_codes + bh * capacity * (D * VB // 8)
        ks = k_scales + bh * capacity
        vs = v_scales + bh * capacity
        r = start + tl.arange(0, BT)
        k_scale = tl.load(ks + r, mask=r < stop, other=0.0)
        v_scale = tl.load(vs + r, mask=r < stop, other=0.0)
        for t in range(start, stop, BT):
            r = t + tl.arange(0, BT)
            ok = r < stop
            # a step ahead: loads under 4 bytes a thread can't be asynchronous copies, and would stall every step
            next_k = tl.load(ks + r + BT, mask=r + BT < stop, other=0.0)
            next_v = tl.load(vs + r + BT, mask=r + BT < stop, other=0.0)
            s = _logits(q0, q1, q2, q3, kc, k_table, r, ok, D, KB, PTX, WIDE)
            s = s * k_scale.to(tl.float32)[None, :] + shift[:, None]
            s = tl.where(ok[None, :], s, -float("inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            top = higher
            p = p * v_scale.to(tl.float32)[None, :]
            if not WIDE:
                p = p.to(tl.float16)
            w = tl.arange(0, VW)
            x = tl.load(vc + r[:, None] * (D * VB // 8) + w[None, :], mask=ok[:, None], other=0)
            if VB == 3:
                x, y = _pairs(x, _high_plane(vc, r, ok, D, D * VB // 8, True), PTX)
            else:
                y = x
            a0 = tl.dot(p, _centroids(x, v_table, VB, 0, PTX, WIDE), a0 * shrink[:, None], input_precision="ieee")
            a1 = tl.dot(p, _centroids(x, v_table, VB, 1, PTX, WIDE), a1 * shrink[:, None], input_precision="ieee")
            if VB != 4:
                a2 = tl.dot(p, _centroids(y, v_table, VB, 2, PTX, WIDE), a2 * shrink[:, None], input_precision="ieee")
                a3 = tl.dot(p, _centroids(y, v_table, VB, 3, PTX, WIDE), a3 * shrink[:, None], input_precision="ieee")
            k_scale = next_k
            v_scale = next_v
        _partial(a0, total, part_ptr, row, G, GP, D, 0, VW)
        _partial(a1, total, part_ptr, row, G, GP, D, VW, VW)
        if VB != 4:
            _partial(a2, total, part_ptr, row, G, GP, D, 2 * VW, VW)
            _partial(a3, total, part_ptr, row, G, GP, D, 3 * VW, VW)
        _weight(top, total, lse_ptr, row, G, GP)


@triton.jit(do_not_specialize=["coded_splits"])
def coded_merge(part_ptr, lse_ptr, rotation, out_ptr, coded_splits,
                G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, SB: tl.constexpr):  # fmt: skip
    """`W` channels of a query head: the coded splits, `SB` at a time, rotated back once, and the exact one."""
    head = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * W + tl.arange(0, W)
    bh = head // G
    g = head % G
    d = tl.arange(0, D)
    splits = coded_splits + 1
    exact = bh * splits + coded_splits
    last = tl.load(lse_ptr + exact * G + g)
    dense = tl.load(part_ptr + (exact * G + g) * D + w)
    back = tl.load(rotation + d[:, None] * D + w[None, :]).to(tl.float32)
    top = last
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for first in range(0, coded_splits, SB):
        s = first + tl.arange(0, SB)
        ok = s < coded_splits
        lse = tl.load(lse_ptr + (bh * splits + s) * G + g, mask=ok, other=-float("inf"))
        part = tl.load(part_ptr + ((bh * splits + s) * G + g)[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - higher)
        shrink = tl.exp2(top - higher)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = higher
    weight = tl.exp2(last - top)
    out = tl.sum(acc[:, None] * back, 0) + dense * weight
    tl.store(out_ptr + head * D + w, (out / (total + weight)).to(out_ptr.dtype.element_ty))
