"""Triton kernels of components at rest: how large they are, and what they are in whole steps, counted in the same pass.

A program has some tokens of one component, of which all contexts and bounds follow but for the tokens' scales. Products
and sums are rounded apart, as torch does, so that numbers are those that a CPU finds for the same components.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv.at_rest.entropy import CAP, WIDTH

TILE = 1024  # tokens at a time
TILES = 16  # of a program
SMALL = 8  # magnitudes below it are counted by tiles, others one by one
WIDE = 4096  # tokens of a component that are summed at a time
ROWS, COLUMNS = 16, 128  # components and tokens of which a block's are summed at a time

_CAP, _WIDTH, _SMALL = tl.constexpr(CAP), tl.constexpr(WIDTH), tl.constexpr(SMALL)


@triton.jit
def component_sizes(value_ptr, found_ptr, tokens, many, BT: tl.constexpr):
    """Mean square and largest magnitude of a component, `[2, components]`."""
    component = tl.program_id(0).to(tl.int64)
    squares, largest = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    for first in range(0, tokens, BT):
        t = first + tl.arange(0, BT)
        size = tl.abs(tl.load(value_ptr + component * tokens + t, mask=t < tokens, other=0.0))
        squares += size * size
        largest = tl.where(size <= largest, largest, size)  # what is no number stays
    unknown = tl.sum((largest != largest).to(tl.int32), 0) > 0
    tl.store(found_ptr + component, tl.sum(squares, 0) / tokens)
    tl.store(found_ptr + many + component, tl.where(unknown, float("nan"), tl.max(largest, 0)))


@triton.jit
def token_sizes(value_ptr, weight_ptr, edge_ptr, found_ptr, tokens, BC: tl.constexpr, BT: tl.constexpr):
    """Weighted sums of the squares of a token's components in each block, `[blocks, tokens]`."""
    block = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    start, stop = tl.load(edge_ptr + block), tl.load(edge_ptr + block + 1)
    summed = tl.zeros([BC, BT], tl.float32)
    for first in range(start, stop, BC):
        c = first + tl.arange(0, BC)
        ok = (c < stop)[:, None] & (t < tokens)[None, :]
        value = tl.load(value_ptr + c.to(tl.int64)[:, None] * tokens + t[None, :], mask=ok, other=0.0)
        summed += value * value * tl.load(weight_ptr + c, mask=c < stop, other=0.0)[:, None]
    tl.store(found_ptr + block.to(tl.int64) * tokens + t, tl.sum(summed, 0), mask=t < tokens)


@triton.jit
def round_rows(value_ptr, place_ptr, bound_ptr, gain_ptr, row_ptr, met_ptr, there, tokens, every, many, inverse,
               LEARN: tl.constexpr, GAIN: tl.constexpr, BINS: tl.constexpr, CONTEXTS: tl.constexpr, BT: tl.constexpr,
               TILES: tl.constexpr):  # fmt: skip
    """Rows and counts of a component's tokens; to `LEARN`, counts alone, of `many` that are `every` so many apart."""
    index = tl.program_id(0).to(tl.int64)
    component = tl.load(place_ptr + index).to(tl.int64)
    level = tl.load(place_ptr + there + index)
    gains = gain_ptr + tl.load(place_ptr + 2 * there + index).to(tl.int64) * tokens
    least, below = tl.load(bound_ptr + level), tl.load(bound_ptr + CONTEXTS + level)
    counted = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        t = (tl.program_id(1) * TILES + tile) * BT + tl.arange(0, BT)
        ok = t < many
        value = tl.load(value_ptr + component * tokens + t * every, mask=ok, other=0.0)
        gain = tl.load(gains + t, mask=ok & (not LEARN), other=0).to(tl.int32)
        size = tl.abs(value) * inverse
        number = tl.where(size >= least, tl.floor(size + below), 0.0)
        number = tl.minimum(number, _CAP).to(tl.int32)
        context = tl.minimum(tl.maximum(level + gain, 0), CONTEXTS - 1)
        if not LEARN:
            signed = tl.where(value < 0, -number, number)
            tl.store(row_ptr + index * tokens + t, (context * _WIDTH + _CAP + signed).to(tl.int16), mask=ok)
        few = ok & (number < _SMALL)
        counted += tl.histogram(tl.where(few, (gain + GAIN) * _SMALL + number, BINS - 1), BINS)  # the last is no gain's
        one = tl.full([BT], 1, tl.int64)
        tl.atomic_add(met_ptr + context * (_CAP + 1) + number, one, mask=ok & (number >= _SMALL), sem="relaxed")
    at = tl.arange(0, BINS)
    context = tl.minimum(tl.maximum(level + at // _SMALL - GAIN, 0), CONTEXTS - 1)
    found = (at // _SMALL <= 2 * GAIN) & (counted > 0)
    tl.atomic_add(met_ptr + context * (_CAP + 1) + at % _SMALL, counted.to(tl.int64), mask=found, sem="relaxed")


@triton.jit
def learn_bounds(met_ptr, bound_ptr, SLOPE: tl.constexpr, MOST: tl.constexpr, LESS: tl.constexpr,
                 CONTEXTS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """As `rounding.Rounding.learn`, of one level."""
    level = tl.program_id(0)
    at = tl.arange(0, B)
    own = met_ptr + level * (_CAP + 1)
    n = tl.load(own + at, mask=at <= _CAP, other=0).to(tl.float64) + 0.5
    total = tl.sum(tl.where(at <= _CAP, n, 0.0), 0)
    zero = -tl.log2((tl.load(own).to(tl.float64) + 0.5) / total)
    one = 1.0 - tl.log2((tl.load(own + 1).to(tl.float64) + 0.5) / total)
    two = 1.0 - tl.log2((tl.load(own + 2).to(tl.float64) + 0.5) / total)
    least = 0.5 + SLOPE * tl.minimum(tl.maximum(one - zero, 0.0), MOST)
    below = 0.5 - SLOPE * tl.minimum(tl.maximum(two - one, 0.0), LESS)
    tl.store(bound_ptr + level, least.to(tl.float32))
    tl.store(bound_ptr + CONTEXTS + level, below.to(tl.float32))


@triton.jit
def write_values(number_ptr, place_ptr, beyond_ptr, found_ptr, components, tokens, stride, step,
                 CONTEXTS: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """What the numbers of a component stand for: see `rounding.values`."""
    component = tl.program_id(0).to(tl.int64)
    index, level = tl.load(place_ptr + component), tl.load(place_ptr + components + component)
    of_one, of_more = tl.load(beyond_ptr + level), tl.load(beyond_ptr + CONTEXTS + level)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    own = number_ptr + index.to(tl.int64) * stride + t
    number = tl.load(own, mask=t < tl.where(index >= 0, tokens, 0), other=0).to(tl.float32)
    beyond = tl.where(tl.abs(number) == 1.0, of_one, of_more)
    beyond = tl.where(number > 0, beyond, tl.where(number < 0, -beyond, 0.0))
    tl.store(found_ptr + component * tokens + t, (beyond + number) * step, mask=t < tokens)


@triton.jit
def sum_beyond(value_ptr, place_ptr, bound_ptr, found_ptr, there, tokens, every, many, inverse,
               CONTEXTS: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """By how much sizes exceed the ones and the larger numbers that they become, and how many there are of these."""
    index = tl.program_id(0).to(tl.int64)
    values = value_ptr + tl.load(place_ptr + index).to(tl.int64) * tokens
    level = tl.load(place_ptr + there + index)
    least, below = tl.load(bound_ptr + level), tl.load(bound_ptr + CONTEXTS + level)
    t = tl.arange(0, BT)
    size = tl.abs(tl.load(values + t * every, mask=t < many, other=0.0)) * inverse
    number = tl.where(size >= least, tl.floor(size + below), 0.0)
    one, more = (number == 1.0).to(tl.float32), (number > 1.0).to(tl.float32)
    tl.store(found_ptr + index, tl.sum(one * (size - number), 0))
    tl.store(found_ptr + there + index, tl.sum(one, 0))
    tl.store(found_ptr + 2 * there + index, tl.sum(more * (size - number), 0))
    tl.store(found_ptr + 3 * there + index, tl.sum(more, 0))


@triton.jit
def sum_errors(value_ptr, level_ptr, table_ptr, found_ptr, tokens, inverse, step, CONTEXTS: tl.constexpr,
               BT: tl.constexpr):  # fmt: skip
    """Squared errors of a component's tokens together; the table has bounds and what numbers stand for."""
    component = tl.program_id(0).to(tl.int64)
    level = tl.load(level_ptr + component)
    least, below = tl.load(table_ptr + level), tl.load(table_ptr + CONTEXTS + level)
    of_one, of_more = tl.load(table_ptr + 2 * CONTEXTS + level), tl.load(table_ptr + 3 * CONTEXTS + level)
    least = tl.where(level > 0, least, float("inf"))
    summed = tl.zeros([BT], tl.float32)
    for first in range(0, tokens, BT):
        t = first + tl.arange(0, BT)
        value = tl.abs(tl.load(value_ptr + component * tokens + t, mask=t < tokens, other=0.0))
        size = value * inverse
        number = tl.where(size >= least, tl.floor(size + below), 0.0)
        beyond = tl.where(number == 1.0, of_one, tl.where(number > 1.0, of_more, 0.0))
        error = (number + beyond) * step - value
        summed += error * error
    tl.store(found_ptr + component, tl.sum(summed, 0))


def sizes(values: torch.Tensor) -> torch.Tensor:
    """Mean squares and largest magnitudes of values `[components, tokens]`, `[2, components]`."""
    found = torch.empty((2, len(values)), dtype=torch.float32, device=values.device)
    component_sizes[(len(values),)](values, found, values.shape[1], len(values), BT=WIDE, num_warps=8)
    return found


def powers(values: torch.Tensor, weights: torch.Tensor, edges: np.ndarray) -> torch.Tensor:
    """Weighted sums over the components of blocks, each from one of the edges to the next, `[blocks, tokens]`."""
    blocks, tokens = len(edges) - 1, values.shape[1]
    found = torch.empty((blocks, tokens), dtype=torch.float32, device=values.device)
    edges = torch.from_numpy(edges.astype(np.int32)).to(values.device)
    token_sizes[(triton.cdiv(tokens, COLUMNS), blocks)](
        values, weights, edges, found, tokens, BC=ROWS, BT=COLUMNS, num_warps=4
    )
    return found


def rounded(
    values: torch.Tensor, placed: torch.Tensor, gains: torch.Tensor, rows: torch.Tensor, bounds: torch.Tensor,
    gain: int, inverse: float, every: int, slope: float, most: tuple[float, float],
) -> torch.Tensor:  # fmt: skip
    """Fill `rows` int16 `[there, tokens]` from values `[components, tokens]`, and count.

    Parameters
    ----------
    placed : torch.Tensor of int32, [3, there]
        Which components are there, their levels and blocks.
    gains : torch.Tensor of int8, [blocks, tokens]
        From `-gain` to `gain`.
    bounds : torch.Tensor of float32, [2, contexts]
        Of rounding, by level; what is learnt twice, from every so many tokens, is left there.
    slope, most : float, pair of float
        What a bit is worth, and at most: see `rounding.Rounding`.

    Returns
    -------
    torch.Tensor of int64, [contexts, CAP + 1]
    """
    contexts, tokens, there = bounds.shape[1], values.shape[1], placed.shape[1]
    met = torch.zeros((3, contexts, CAP + 1), dtype=torch.int64, device=values.device)
    if not there or not tokens:
        return met[-1]
    bins = triton.next_power_of_2((2 * gain + 1) * SMALL + 1)
    for counts in met:
        learn = counts.data_ptr() != met[-1].data_ptr()
        step = every if learn else 1
        many = -(-tokens // step)
        tiles = min(TILES, triton.cdiv(many, TILE))
        round_rows[(there, triton.cdiv(many, TILE * tiles))](
            values, placed, bounds, gains, rows, counts, there, tokens, step, many, inverse,
            LEARN=learn, GAIN=gain, BINS=bins, CONTEXTS=contexts, BT=TILE, TILES=tiles, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        if learn:
            learn_bounds[(contexts,)](
                counts, bounds, SLOPE=slope, MOST=most[0], LESS=most[1], CONTEXTS=contexts,
                B=triton.next_power_of_2(CAP + 1), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return met[-1]


def stand_for(numbers: torch.Tensor, placed: torch.Tensor, beyond: torch.Tensor, step: float, out: torch.Tensor):
    """Fill float32 `[components, tokens]` from numbers `[there, tokens]`.

    Parameters
    ----------
    placed : torch.Tensor of int32, [2, components]
        Which of the rows of numbers is a component's, or -1; and its level.
    beyond : torch.Tensor of float32, [2, contexts]
        See `rounding.beyond_of`.
    """
    components, tokens = out.shape
    if numbers.stride(1) != 1:
        numbers = numbers.contiguous()
    write_values[(components, triton.cdiv(tokens, TILE))](
        numbers, placed, beyond, out, components, tokens, numbers.stride(0), step, CONTEXTS=beyond.shape[1], BT=TILE,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def beyond(values: torch.Tensor, placed: torch.Tensor, bounds: torch.Tensor, inverse: float, every: int):
    """Sums and counts float32 `[4, there]` for `rounding.means`, of every so many tokens; see `rounded`."""
    there, many = placed.shape[1], -(-values.shape[1] // every)
    found = torch.empty((4, there), dtype=torch.float32, device=values.device)
    if there:
        sum_beyond[(there,)](
            values, placed, bounds, found, there, values.shape[1], every, many, inverse, CONTEXTS=bounds.shape[1],
            BT=triton.next_power_of_2(many), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def errors(values: torch.Tensor, levels: torch.Tensor, table: torch.Tensor, inverse: float, step: float):
    """Squared errors float32 `[components]` of values `[components, tokens]` of int32 levels.

    Parameters
    ----------
    table : torch.Tensor of float32, [4, contexts]
        Bounds of rounding, and `rounding.beyond_of`.
    """
    found = torch.empty(len(values), dtype=torch.float32, device=values.device)
    sum_errors[(len(values),)](
        values, levels, table, found, values.shape[1], inverse, step, CONTEXTS=table.shape[1], BT=TILE, num_warps=4
    )
    return found
