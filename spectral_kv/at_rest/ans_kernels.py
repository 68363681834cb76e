"""Triton kernels of the entropy coder: one program a stream, whose lanes advance side by side.

What a step reads does not depend on the states before it, and is asked for a step or two ahead.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from spectral_kv.at_rest import ans
from spectral_kv.at_rest.entropy import PRECISION, WHOLE, Tables

LANES = 32  # of a warp

_LOW, _BITS, _ROOM = (tl.constexpr(x) for x in (ans.LOW, ans.BITS, ans.ROOM))
_PRECISION, _WHOLE = tl.constexpr(PRECISION), tl.constexpr(WHOLE)


@triton.jit
def _place(step, stride, lanes, TURNS: tl.constexpr):
    """Where the numbers of a step begin in a stream."""
    return stride * (step // TURNS) + step % TURNS * lanes


@triton.jit(do_not_specialize=["steps", "stride", "room"])
def encode_streams(row_ptr, entry_ptr, word_ptr, count_ptr, state_ptr, steps, stride, lanes, room,
                   TURNS: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """Write words from the end of a stream's `room` on down, beginning with the last step."""
    stream = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    ok = lane < lanes
    stride = stream * 0 + stride  # of 64 bits: numbers may be more than 32 can count
    rows = row_ptr + stream * TURNS * lanes + lane
    words = word_ptr + stream * room
    state = tl.full([L], _LOW, tl.int32)
    entry = tl.load(entry_ptr + tl.load(rows + _place(steps - 1, stride, lanes, TURNS), mask=ok, other=0).to(tl.int32),
                    mask=ok, other=_WHOLE)  # fmt: skip
    row = tl.load(rows + _place(tl.maximum(steps - 2, 0), stride, lanes, TURNS), mask=ok, other=0).to(tl.int32)
    left = room
    for done in range(0, steps):
        following = tl.load(entry_ptr + row, mask=ok, other=_WHOLE)
        row = tl.load(rows + _place(tl.maximum(steps - 3 - done, 0), stride, lanes, TURNS), mask=ok, other=0)
        row = row.to(tl.int32)
        frequency = entry & 0xFFFF
        full = ((state >> _ROOM) >= frequency).to(tl.int32)
        left -= tl.sum(full, 0)
        tl.store(words + left + tl.cumsum(full, 0) - 1, (state & 0xFFFF).to(tl.int16), mask=full > 0)
        state = state >> (full * _BITS)
        quotient = (state.to(tl.uint32) // frequency.to(tl.uint32)).to(tl.int32)
        state += quotient * (_WHOLE - frequency) + (entry >> 16)
        entry = following
    tl.store(count_ptr + stream, room - left)
    tl.store(state_ptr + stream * lanes + lane, state, mask=ok)


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
    context = tl.load(context_ptr + own, mask=ok, other=0)
    for step in range(0, steps):
        following = tl.load(
            context_ptr + own + _place(tl.minimum(step + 1, steps - 1), stride, lanes, TURNS), mask=ok, other=0
        )
        slot = (context.to(tl.int32) << _PRECISION) + (state & (_WHOLE - 1))
        entry = tl.load(slot_ptr + slot, mask=ok, other=_WHOLE)
        number = tl.load(number_ptr + slot, mask=ok, other=0)
        state = (state >> _PRECISION) * (entry & 0xFFFF) + (entry >> 16)
        low = ((state < _LOW) & ok).to(tl.int32)
        place = at + tl.cumsum(low, 0) - 1
        word = tl.load(word_ptr + place, mask=(low > 0) & (place <= last), other=0).to(tl.int32) & 0xFFFF
        state = tl.where(low > 0, state << _BITS | word, state)
        at += tl.sum(low, 0)
        tl.store(found_ptr + own + _place(step, stride, lanes, TURNS), number, mask=ok)
        context = following
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
    return found.copy_(x).numpy().copy()


def encode(rows: torch.Tensor, tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `ans.encode`."""
    rows = rows.contiguous()
    count, streams, turns, lanes = rows.shape
    room = max(count * turns * lanes, 1)
    entries = torch.from_numpy(tables.entries).to(rows.device)
    words = torch.empty((streams, room), dtype=torch.int16, device=rows.device)
    counts = torch.zeros(streams, dtype=torch.int64, device=rows.device)
    states = torch.full((streams, lanes), ans.LOW, dtype=torch.int32, device=rows.device)
    if count * turns:
        encode_streams[(streams,)](
            rows, entries, words, counts, states, count * turns, rows.stride(0), lanes, room, TURNS=turns,
            **_width(lanes),
        )  # fmt: skip
    many = counts.tolist()
    found = torch.cat([row[room - n :] for row, n in zip(words, many, strict=True)])
    return _on_host(found).view(np.uint16), np.array(many, dtype=np.int64), states.cpu().numpy()


class Decoder:
    """As `ans.Decoder`, on a device."""

    def __init__(self, words: np.ndarray, starts: np.ndarray, states: np.ndarray, device: torch.device):
        kept = torch.empty(len(words), dtype=torch.int16, pin_memory=device.type == "cuda")
        kept.numpy()[:] = words.view(np.int16)
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
