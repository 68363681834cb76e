"""A Triton kernel that rounds components to whole steps, finds where they stand in tables and counts them, in a pass.

A program has some tokens of one component, of which all contexts and bounds follow but for the tokens' scales. Products
and sums are rounded apart, as torch does, so that numbers are those that a CPU finds for the same components.
"""

import torch
import triton
import triton.language as tl

from spectral_kv.at_rest.entropy import CAP, WIDTH

TILE = 1024  # tokens at a time
TILES = 16  # of a program
SMALL = 8  # magnitudes below it are counted by tiles, others one by one

_CAP, _WIDTH, _SMALL = tl.constexpr(CAP), tl.constexpr(WIDTH), tl.constexpr(SMALL)


@triton.jit
def round_rows(value_ptr, there_ptr, level_ptr, block_ptr, least_ptr, below_ptr, gain_ptr, row_ptr, met_ptr, tokens,
               inverse, GAIN: tl.constexpr, BINS: tl.constexpr, CONTEXTS: tl.constexpr, BT: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    component = tl.load(there_ptr + index)
    level = tl.load(level_ptr + index)
    gains = gain_ptr + tl.load(block_ptr + index) * tokens
    least, below = tl.load(least_ptr + index), tl.load(below_ptr + index)
    counted = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        t = (tl.program_id(1) * TILES + tile) * BT + tl.arange(0, BT)
        ok = t < tokens
        value = tl.load(value_ptr + component * tokens + t, mask=ok, other=0.0)
        gain = tl.load(gains + t, mask=ok, other=0).to(tl.int32)
        size = tl.abs(value) * inverse
        number = tl.where(size >= least, tl.floor(size + below), 0.0)
        number = tl.minimum(number, _CAP).to(tl.int32)
        context = tl.minimum(tl.maximum(level + gain, 0), CONTEXTS - 1)
        signed = tl.where(value < 0, -number, number)
        tl.store(row_ptr + index * tokens + t, (context * _WIDTH + _CAP + signed).to(tl.int16), mask=ok)
        few = ok & (number < _SMALL)
        counted += tl.histogram(tl.where(few, (gain + GAIN) * _SMALL + number, BINS - 1), BINS)  # the last is no gain's
        one = tl.full([BT], 1, tl.int64)
        tl.atomic_add(met_ptr + context * (_CAP + 1) + number, one, mask=ok & (number >= _SMALL), sem="relaxed")
    at = tl.arange(0, BINS)
    context = tl.minimum(tl.maximum(level + at // _SMALL - GAIN, 0), CONTEXTS - 1)
    there = (at // _SMALL <= 2 * GAIN) & (counted > 0)
    tl.atomic_add(met_ptr + context * (_CAP + 1) + at % _SMALL, counted.to(tl.int64), mask=there, sem="relaxed")


def rounded(values, there, levels, block, least, below, gains, rows, contexts: int, gain: int, inverse: float):
    """Fill `rows` int16 `[there, tokens]` from values `[components, tokens]`, and count.

    Parameters
    ----------
    there, levels, block, least, below : torch.Tensor, [there]
        Which components are there, int64; their levels and blocks, int32; the bounds of rounding, float32.
    gains : torch.Tensor of int8, [blocks, tokens]
        From `-gain` to `gain`.

    Returns
    -------
    torch.Tensor of int64, [contexts, CAP + 1]
    """
    met = torch.zeros((contexts, CAP + 1), dtype=torch.int64, device=values.device)
    tokens = values.shape[1]
    if len(there) and tokens:
        tiles = min(TILES, triton.cdiv(tokens, TILE))
        round_rows[(len(there), triton.cdiv(tokens, TILE * tiles))](
            values, there, levels, block, least, below, gains, rows, met, tokens, inverse,
            GAIN=gain, BINS=triton.next_power_of_2((2 * gain + 1) * SMALL + 1), CONTEXTS=contexts, BT=TILE, TILES=tiles,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return met
