"""Triton kernels of ExpectedAttention: moments of queries before their rotation, and expected logits of keys."""

import triton
import triton.language as tl


@triton.jit
def _query(base, t, first, ok, cos_ptr, sin_ptr, stride, D: tl.constexpr):
    """Both halves of the queries `t` before their rotation, zero where not `ok`; the first is at position `first`."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    a = tl.load(base + t.to(tl.int64)[:, None] * stride + d[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    b = tl.load(base + t.to(tl.int64)[:, None] * stride + HALF + d[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (first + t)[:, None] * HALF + d[None, :], mask=ok[:, None], other=0.0)
    sin = tl.load(sin_ptr + (first + t)[:, None] * HALF + d[None, :], mask=ok[:, None], other=0.0)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def query_sums(addresses, cos_ptr, sin_ptr, out_ptr, left_out, count, first, stride, head_stride, heads, chunk,
               D: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Sums over a chunk of the queries from `left_out` on, `[rows, chunks, D]`."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    base = tl.load(addresses + row // heads).to(tl.pointer_type(DTYPE)) + (row % heads) * head_stride
    stop = tl.minimum(left_out + (part + 1) * chunk, count)
    a = tl.zeros([BT, HALF], tl.float32)
    b = tl.zeros([BT, HALF], tl.float32)
    for start in range(left_out + part * chunk, stop, BT):
        t = start + tl.arange(0, BT)
        one, other = _query(base, t, first, t < stop, cos_ptr, sin_ptr, stride, D)
        a += one
        b += other
    target = out_ptr + (row * tl.num_programs(0) + part) * D + tl.arange(0, HALF)
    tl.store(target, tl.sum(a, 0))
    tl.store(target + HALF, tl.sum(b, 0))


@triton.jit
def query_scatter(addresses, cos_ptr, sin_ptr, mean_ptr, out_ptr, left_out, count, first, stride, head_stride, heads,
                  chunk, D: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Sums of outer products of queries less their mean over a chunk, `[rows, chunks, D, D]`."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    base = tl.load(addresses + row // heads).to(tl.pointer_type(DTYPE)) + (row % heads) * head_stride
    mean_a = tl.load(mean_ptr + row * D + d)
    mean_b = tl.load(mean_ptr + row * D + HALF + d)
    stop = tl.minimum(left_out + (part + 1) * chunk, count)
    aa = tl.zeros([HALF, HALF], tl.float32)
    ab = tl.zeros([HALF, HALF], tl.float32)
    bb = tl.zeros([HALF, HALF], tl.float32)
    for start in range(left_out + part * chunk, stop, BT):
        t = start + tl.arange(0, BT)
        ok = t < stop
        a, b = _query(base, t, first, ok, cos_ptr, sin_ptr, stride, D)
        a = tl.where(ok[:, None], a - mean_a[None, :], 0.0)
        b = tl.where(ok[:, None], b - mean_b[None, :], 0.0)
        aa = tl.dot(tl.trans(a), a, aa, input_precision=PRECISION)
        ab = tl.dot(tl.trans(a), b, ab, input_precision=PRECISION)
        bb = tl.dot(tl.trans(b), b, bb, input_precision=PRECISION)
    target = out_ptr + (row * tl.num_programs(0) + part) * D * D
    upper = target + d[:, None] * D + d[None, :]
    lower = target + d[None, :] * D + d[:, None]
    tl.store(upper, aa)
    tl.store(upper + HALF, ab)
    tl.store(lower + HALF * D, ab)
    tl.store(upper + HALF * D + HALF, bb)


@triton.jit
def expected_logits(addresses, values, mean_ptr, covariance_ptr, out_ptr, norm_ptr, tokens, heads, scaling,
                    G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """`scaling * k mu + scaling^2 / 2 * k S k` of keys for the query heads of a group, and norms of values."""
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    ok = t < tokens
    keys = tl.multiple_of(tl.load(addresses + row // heads).to(tl.pointer_type(DTYPE)), 16)
    held = tl.multiple_of(tl.load(values + row // heads).to(tl.pointer_type(DTYPE)), 16)
    place = ((row % heads) * tokens + t)[:, None] * D + d[None, :]
    v = tl.load(held + place, mask=ok[:, None], other=0.0).to(tl.float32)
    tl.store(norm_ptr + row * tokens + t, tl.sqrt(tl.sum(v * v, 1)), mask=ok)
    k = tl.load(keys + place, mask=ok[:, None], other=0.0).to(tl.float32)
    for g in range(G):
        mean = tl.load(mean_ptr + (row * G + g) * D + d)
        covariance = tl.load(covariance_ptr + (row * G + g) * D * D + d[:, None] * D + d[None, :])
        spread = tl.sum(tl.dot(k, covariance, input_precision=PRECISION) * k, 1)
        logit = tl.sum(k * mean[None, :], 1) * scaling + spread * (scaling * scaling * 0.5)
        tl.store(out_ptr + (row * G + g) * tokens + t, logit, mask=ok)
