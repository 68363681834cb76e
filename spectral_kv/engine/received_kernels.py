"""Triton kernels of the attention that tokens receive: queries are gone through twice, weights never written down."""

import triton
import triton.language as tl


@triton.jit
def _weights(q, k, log_mass, i, t, count, tokens, first, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """Weights `[queries, keys]`, zero where a query does not see a key."""
    seen = (i < count)[:, None] & (t < tokens)[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= first + i[:, None])
    s = tl.dot(q, k, input_precision=PRECISION) * scale
    return tl.exp2(tl.where(seen, s - log_mass[:, None], -float("inf")))


@triton.jit(do_not_specialize=["count", "tokens", "first"])
def log_masses(q_ptr, k_ptr, out_ptr, count, tokens, first, stride, head_stride, scale, G: tl.constexpr,
               D: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Binary logarithm of the sum of exponentials over the keys that a query sees, `[query_heads, count]`."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, D)
    at = q_ptr + head * head_stride + i.to(tl.int64)[:, None] * stride + d[None, :]
    q = tl.load(at, mask=(i < count)[:, None], other=0.0)
    keys = k_ptr + (head // G) * tokens * D
    top = tl.full([BQ], -1e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    stop = tokens
    if CAUSAL:
        stop = tl.minimum(tokens, first + (tl.program_id(0) + 1) * BQ)
    for start in range(0, stop, BT):
        t = start + tl.arange(0, BT)
        k = tl.load(keys + t[None, :] * D + d[:, None], mask=(t < tokens)[None, :], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = (t < tokens)[None, :]
        if CAUSAL:
            seen = seen & (t[None, :] <= first + i[:, None])
        s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    tl.store(out_ptr + head * count + i, top + tl.log2(total), mask=i < count)


@triton.jit(do_not_specialize=["count", "tokens", "first"])
def received(q_ptr, k_ptr, log_mass_ptr, out_ptr, count, tokens, first, stride, head_stride, scale, G: tl.constexpr,
             D: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Weight of a tile of keys summed over queries, and the mean over the query heads of a KV head."""
    kv_head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = tl.arange(0, D)
    k = tl.load(k_ptr + kv_head * tokens * D + t[None, :] * D + d[:, None], mask=(t < tokens)[None, :], other=0.0)
    total = tl.zeros([BT], tl.float32)
    earliest = 0
    if CAUSAL:  # no query before the tile sees it
        earliest = tl.maximum(tl.program_id(0) * BT - first, 0) // BQ * BQ
    for g in range(G):
        head = kv_head * G + g
        for start in range(earliest, count, BQ):
            i = start + tl.arange(0, BQ)
            at = q_ptr + head * head_stride + i.to(tl.int64)[:, None] * stride + d[None, :]
            q = tl.load(at, mask=(i < count)[:, None], other=0.0)
            log_mass = tl.load(log_mass_ptr + head * count + i, mask=i < count, other=0.0)
            total += tl.sum(_weights(q, k, log_mass, i, t, count, tokens, first, scale, CAUSAL, PRECISION), 0)
    tl.store(out_ptr + kv_head * tokens + t, total / G, mask=t < tokens)
