"""Triton kernels of what is left once tokens have deviations: the blend of terms, and the tokens of highest scores.

One program a row, which is a KV head of a layer.
"""

import triton
import triton.language as tl


@triton.jit
def _extremes(row_ptr, start, stop, SIGN: tl.constexpr, BT: tl.constexpr):
    """Smallest number of a stretch of a row, and by how much the largest exceeds it; 1 where by nothing."""
    low = tl.full([BT], float("inf"), tl.float32)
    high = tl.full([BT], -float("inf"), tl.float32)
    for first in range(start, stop, BT):
        t = first + tl.arange(0, BT)
        ok = t < stop
        x = SIGN * tl.load(row_ptr + t, mask=ok, other=0.0)
        low = tl.minimum(low, tl.where(ok, x, float("inf")))
        high = tl.maximum(high, tl.where(ok, x, -float("inf")))
    least = tl.min(low, 0)
    span = tl.max(high, 0) - least
    return least, tl.where(span > 0, span, 1.0)


@triton.jit
def blend_rows(deviation_ptr, norm_ptr, recency_ptr, out_ptr, tokens, start, stop, spectral, recency, weight,
               SIGN: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Weighted sum of a deviation and a norm, each scaled to [0, 1] between `start` and `stop`, and of recency."""
    row = tl.program_id(0).to(tl.int64) * tokens
    least, span = _extremes(deviation_ptr + row, start, stop, SIGN, BT)
    shortest, reach = _extremes(norm_ptr + row, start, stop, 1.0, BT)
    for first in range(0, tokens, BT):
        t = first + tl.arange(0, BT)
        ok = t < tokens
        x = SIGN * tl.load(deviation_ptr + row + t, mask=ok, other=0.0)
        y = tl.load(norm_ptr + row + t, mask=ok, other=0.0)
        r = tl.load(recency_ptr + t, mask=ok, other=0.0)
        score = spectral * tl.div_rn(x - least, span) + recency * r + weight * tl.div_rn(y - shortest, reach)
        tl.store(out_ptr + row + t, score, mask=ok)


@triton.jit
def _ordered(row_ptr, t, ok):
    """Scores at `t` as integers of the same order, and whether one is not a number; those not `ok` are the least."""
    x = tl.load(row_ptr + t, mask=ok, other=0.0)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # zeros of both signs are equal
    return tl.where(ok, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF - 1), x != x


@triton.jit
def _at_least(row_ptr, keys, edge, start, stop, WHOLE: tl.constexpr, BT: tl.constexpr):
    """How many scores are not below `edge`."""
    if WHOLE:
        return tl.sum((keys >= edge).to(tl.int32), 0)
    else:
        count = tl.zeros([BT], tl.int32)
        for first in range(start, stop, BT):
            t = first + tl.arange(0, BT)
            some, _ = _ordered(row_ptr, t, t < stop)
            count += (some >= edge).to(tl.int32)
        return tl.sum(count, 0)


@triton.jit(do_not_specialize=["tokens", "start", "stop", "quota"])
def select_rows(score_ptr, kept_ptr, bad_ptr, tokens, start, stop, quota, WHOLE: tl.constexpr, BT: tl.constexpr):
    """Tokens before `start`, the `quota` of highest score up to `stop`, and those after it, ascending.

    Equal scores go to the lowest index. The last score that counts is found bit by bit; `WHOLE` says that a tile holds
    all tokens that may be evicted, which are then read once.
    """
    row = tl.program_id(0).to(tl.int64)
    scores = score_ptr + row * tokens
    kept = kept_ptr + row * (quota + start + tokens - stop)
    keys, odd = _ordered(scores, start + tl.arange(0, BT), start + tl.arange(0, BT) < stop)
    lowest = tl.full([], -0x7FFFFFFF - 1, tl.int32)
    edge = tl.where(_at_least(scores, keys, 0, start, stop, WHOLE, BT) >= quota, 0, lowest)
    for step in range(0, 31):
        higher = edge + (tl.full([], 1 << 30, tl.int32) >> step)
        edge = tl.where(_at_least(scores, keys, higher, start, stop, WHOLE, BT) >= quota, higher, edge)
    above = tl.minimum(edge, 0x7FFFFFFE) + 1
    equal = quota - _at_least(scores, keys, above, start, stop, WHOLE, BT)  # wanted of those at the edge
    bad = tl.zeros([], tl.int32)
    place = start
    for first in range(start, stop, BT):
        t = first + tl.arange(0, BT)
        if not WHOLE:
            keys, odd = _ordered(scores, t, t < stop)
        bad = tl.maximum(bad, tl.max((odd & (t < stop)).to(tl.int32), 0))
        same = (keys == edge).to(tl.int32) * (t < stop).to(tl.int32)
        chosen = (keys > edge) | ((same > 0) & (tl.cumsum(same, 0) <= equal))
        counted = chosen.to(tl.int32)
        tl.store(kept + place + tl.cumsum(counted, 0) - 1, t.to(tl.int64), mask=chosen)
        equal -= tl.sum(same, 0)
        place += tl.sum(counted, 0)
    tl.store(bad_ptr + row, bad)
    for first in range(0, start, 64):
        t = first + tl.arange(0, 64)
        tl.store(kept + t, t.to(tl.int64), mask=t < start)
    for first in range(stop, tokens, 64):
        t = first + tl.arange(0, 64)
        tl.store(kept + start + quota + t - stop, t.to(tl.int64), mask=t < tokens)
