"""Triton kernels of the entropy coder: one program a stream, whose lanes advance side by side.

What steps read does not depend on the states before them, and is asked for eight steps and more ahead.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv.at_rest import ans
from spectral_kv.at_rest.entropy import PRECISION, WHOLE, Tables

LANES = 32  # of a warp
TILE = 2048  # words, or none, that are gathered together

_LOW, _BITS, _ROOM = (tl.constexpr(x) for x in (ans.LOW, ans.BITS, ans.ROOM))
_PRECISION, _WHOLE = tl.constexpr(PRECISION), tl.constexpr(WHOLE)


@triton.jit
def _place(step, stride, lanes, TURNS: tl.constexpr):
    """Where the numbers of a step begin in a stream."""
    return stride * (step // TURNS) + step % TURNS * lanes


@triton.jit
def _eight(numbers, step, by, steps, stride, lanes, ok, TURNS: tl.constexpr):
    """What eight steps read, the first of them `step` and the others `by` one more each; zeros where there is none."""
    return (
        _number(numbers, step, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 2 * by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 3 * by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 4 * by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 5 * by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 6 * by, steps, stride, lanes, ok, TURNS),
        _number(numbers, step + 7 * by, steps, stride, lanes, ok, TURNS),
    )


@triton.jit
def _number(numbers, step, steps, stride, lanes, ok, TURNS: tl.constexpr):
    step = tl.minimum(tl.maximum(step, 0), steps - 1)
    return tl.load(numbers + _place(step, stride, lanes, TURNS), mask=ok, other=0).to(tl.int32)


@triton.jit
def _entry(entry_ptr, row, step, lane, lanes):
    """Of a row, or one that changes no state where there is no such step."""
    return tl.load(entry_ptr + row, mask=lane < tl.where(step >= 0, lanes, 0), other=_WHOLE)


@triton.jit
def _entries(entry_ptr, rows, step, lane, lanes):
    return (
        _entry(entry_ptr, rows[0], step, lane, lanes), _entry(entry_ptr, rows[1], step - 1, lane, lanes),
        _entry(entry_ptr, rows[2], step - 2, lane, lanes), _entry(entry_ptr, rows[3], step - 3, lane, lanes),
        _entry(entry_ptr, rows[4], step - 4, lane, lanes), _entry(entry_ptr, rows[5], step - 5, lane, lanes),
        _entry(entry_ptr, rows[6], step - 6, lane, lanes), _entry(entry_ptr, rows[7], step - 7, lane, lanes),
    )  # fmt: skip


@triton.jit(do_not_specialize=["steps", "stride"])
def encode_lanes(row_ptr, entry_ptr, word_ptr, state_ptr, steps, stride, lanes, TURNS: tl.constexpr, L: tl.constexpr):
    """Words that leave `L` of a stream's lanes at each step, or -1; lanes do not depend on one another here."""
    stream = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * L + tl.arange(0, L)
    ok = lane < lanes
    stride = stream * 0 + stride  # of 64 bits: numbers may be more than 32 can count
    numbers = row_ptr + stream * TURNS * lanes + lane
    words = word_ptr + stream * steps * lanes + lane
    state = tl.full([L], _LOW, tl.int32)
    rows = _eight(numbers, steps - 1, -1, steps, stride, lanes, ok, TURNS)
    entries = _entries(entry_ptr, rows, steps - 1, lane, lanes)
    rows = _eight(numbers, steps - 9, -1, steps, stride, lanes, ok, TURNS)
    for done in range(0, steps, 8):
        last = steps - 1 - done
        later = _eight(numbers, last - 16, -1, steps, stride, lanes, ok, TURNS)
        following = _entries(entry_ptr, rows, last - 8, lane, lanes)
        for index in tl.static_range(8):
            entry, step = entries[index], last - index
            frequency = entry & 0xFFFF
            inverse = 1.0 / frequency.to(tl.float32)
            full = (state >> _ROOM) >= frequency
            there = lane < tl.where(step >= 0, lanes, 0)
            tl.store(words + step.to(tl.int64) * lanes, tl.where(full, state & 0xFFFF, -1), mask=there)
            state = tl.where(full, state >> _BITS, state)
            quotient = (state.to(tl.float32) * inverse).to(tl.int32)  # below 2^19, so that it is off by one at most
            rest = state - quotient * frequency
            quotient += (rest >= frequency).to(tl.int32) - (rest < 0).to(tl.int32)
            state += quotient * (_WHOLE - frequency) + (entry >> 16)
        entries, rows = following, later
    tl.store(state_ptr + stream * lanes + lane, state, mask=ok)


@triton.jit
def count_words(word_ptr, count_ptr, size, tiles, BT: tl.constexpr):
    """How many words there are in each tile of each stream's."""
    program = tl.program_id(0).to(tl.int64)  # all on one axis: others have room for 65535
    stream, tile = program // tiles, program % tiles
    t = tile * BT + tl.arange(0, BT)
    word = tl.load(word_ptr + stream * size + t, mask=t < size, other=-1)
    tl.store(count_ptr + program, tl.sum((word >= 0).to(tl.int32), 0))


@triton.jit
def gather_words(word_ptr, end_ptr, found_ptr, size, tiles, BT: tl.constexpr):
    """Words of each tile to where they belong, before `end_ptr`."""
    program = tl.program_id(0).to(tl.int64)  # all on one axis: others have room for 65535
    stream, tile = program // tiles, program % tiles
    t = tile * BT + tl.arange(0, BT)
    word = tl.load(word_ptr + stream * size + t, mask=t < size, other=-1)
    there = (word >= 0).to(tl.int32)
    place = tl.load(end_ptr + program) - tl.sum(there, 0) + tl.cumsum(there, 0) - 1
    tl.store(found_ptr + place, word.to(tl.int16), mask=there > 0)


@triton.jit(do_not_specialize=["steps", "stride"])
def decode_streams(context_ptr, number_ptr, slot_ptr, word_ptr, at_ptr, state_ptr, found_ptr, steps, stride, lanes,
                   last, TURNS: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Read on where streams were left, and leave them there."""
    stream = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    ok = lane < lanes
    stride = stream * 0 + stride  # of 64 bits: numbers may be more than 32 can count
    own = stream * TURNS * lanes + lane
    at = tl.load(at_ptr + stream)
    state = tl.load(state_ptr + stream * lanes + lane, mask=ok, other=_LOW)
    contexts = _eight(context_ptr + own, 0, 1, steps, stride, lanes, ok, TURNS)
    for first in range(0, steps, 8):
        following = _eight(context_ptr + own, first + 8, 1, steps, stride, lanes, ok, TURNS)
        for index in tl.static_range(8):
            step = first + index
            there = lane < tl.where(step < steps, lanes, 0)
            slot = (contexts[index] << _PRECISION) + (state & (_WHOLE - 1))
            entry = tl.load(slot_ptr + slot, mask=ok, other=_WHOLE)
            number = tl.load(number_ptr + slot, mask=ok, other=0)
            state = tl.where(there, (state >> _PRECISION) * (entry & 0xFFFF) + (entry >> 16), state)
            low = ((state < _LOW) & there).to(tl.int32)
            place = at + tl.cumsum(low, 0) - 1
            word = tl.load(word_ptr + place, mask=(low > 0) & (place <= last), other=0).to(tl.int32) & 0xFFFF
            state = tl.where(low > 0, state << _BITS | word, state)
            at += tl.sum(low, 0)
            tl.store(found_ptr + own + _place(step, stride, lanes, TURNS), number, mask=there)
        contexts = following
    tl.store(at_ptr + stream, at)
    tl.store(state_ptr + stream * lanes + lane, state, mask=ok)


@triton.jit
def count_numbers(number_ptr, found_ptr, many, size, COPIES: tl.constexpr, BT: tl.constexpr):
    """Add up how often numbers are met, in one of several copies."""
    program = tl.program_id(0).to(tl.int64)
    t = program * BT + tl.arange(0, BT)
    number = tl.load(number_ptr + t, mask=t < many, other=0).to(tl.int32)
    tl.atomic_add(found_ptr + program % COPIES * size + number, 1, mask=t < many, sem="relaxed")


def _width(lanes: int) -> dict[str, int]:
    return {"L": triton.next_power_of_2(lanes), "num_warps": min(max(triton.next_power_of_2(lanes) // LANES, 1), 8)}


def _on_host(x: torch.Tensor) -> np.ndarray:
    """A copy by way of pinned memory, which takes a tenth of the time and is not held while a cache is parked."""
    found = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return torch.empty(x.shape, dtype=x.dtype).copy_(found.copy_(x)).numpy()


def encode(rows: torch.Tensor, tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `ans.encode`."""
    rows = rows.contiguous()
    count, streams, turns, lanes = rows.shape
    steps, device = count * turns, rows.device
    size = steps * lanes
    if not size or not streams:
        return np.zeros(0, np.uint16), np.zeros(streams, np.int64), np.full((streams, lanes), ans.LOW, np.int32)
    entries = torch.from_numpy(tables.entries).to(device)
    words = torch.empty((streams, size), dtype=torch.int32, device=device)
    states = torch.empty((streams, lanes), dtype=torch.int32, device=device)
    encode_lanes[(streams, triton.cdiv(lanes, LANES))](
        rows, entries, words, states, steps, rows.stride(0), lanes, TURNS=turns, L=LANES, num_warps=1,
    )  # fmt: skip
    tiles = triton.cdiv(size, TILE)
    ends = torch.empty((streams, tiles), dtype=torch.int32, device=device)
    count_words[(streams * tiles,)](words, ends, size, tiles, BT=TILE, num_warps=4)
    ends = ends.view(-1).cumsum(0)
    last = ends[tiles - 1 :: tiles].cpu().numpy()
    found = torch.empty(int(last[-1]), dtype=torch.int16, device=device)
    gather_words[(streams * tiles,)](words, ends, found, size, tiles, BT=TILE, num_warps=4)
    return _on_host(found).view(np.uint16), np.diff(last, prepend=0), states.cpu().numpy()


class Decoder:
    """As `ans.Decoder`, on a device."""

    def __init__(self, words: np.ndarray, starts: np.ndarray, states: np.ndarray, device: torch.device):
        kept = torch.empty(len(words), dtype=torch.int16, pin_memory=device.type == "cuda")
        kept.copy_(torch.from_numpy(words.view(np.int16)))
        self.words = kept.to(device, non_blocking=True)
        self.at = torch.tensor(starts, dtype=torch.int64, device=device)
        self.states = torch.tensor(states, dtype=torch.int32, device=device)

    def __call__(self, contexts: torch.Tensor, tables: Tables) -> torch.Tensor:
        contexts = contexts.contiguous()
        count, streams, turns, lanes = contexts.shape
        numbers, slots = (torch.from_numpy(x).to(contexts.device) for x in (tables.numbers, tables.slots))
        found = torch.empty(contexts.shape, dtype=torch.int16, device=contexts.device)
        if count * turns:
            decode_streams[(streams,)](
                contexts, numbers, slots, self.words, self.at, self.states, found, count * turns, contexts.stride(0),
                lanes, len(self.words) - 1, TURNS=turns, **_width(lanes),
            )  # fmt: skip
        return found


def counts(numbers: torch.Tensor, size: int, copies: int = 256, block: int = 4096) -> np.ndarray:
    """As `counting.counts`."""
    numbers = numbers.contiguous()
    found = torch.zeros((copies, size), dtype=torch.int32, device=numbers.device)
    if many := numbers.numel():
        count_numbers[(triton.cdiv(many, block),)](numbers, found, many, size, COPIES=copies, BT=block, num_warps=4)
    return found.sum(dim=0, dtype=torch.int64).cpu().numpy()
