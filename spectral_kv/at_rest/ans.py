"""An interleaved asymmetric numeral system: many lanes side by side, which array operations advance together.

Every lane has a state of 31 bits of its own and codes one number a step. What no longer fits leaves by 16 bits, for all
lanes of a stream into one row of words, in the order in which a decoder will ask for them. All is whole-number
arithmetic, so that every device writes the same words. J. Duda, arXiv 1311.2540; F. Giesen, arXiv 1402.3392.
"""

from collections.abc import Callable

import numpy as np
import torch

from spectral_kv.at_rest.counting import on_gpu
from spectral_kv.at_rest.entropy import PRECISION, WHOLE, Tables
from spectral_kv.at_rest.threads import Ahead, each

BITS = 16  # that leave a state at once
LOW = 1 << 15  # the smallest state between steps; the largest is below LOW << BITS
ROOM = 31 - PRECISION  # a number of a frequency can be added to states below it, shifted by so much
LANES = 128  # of a stream, at most: each costs the bytes of a state
TOGETHER = 4096  # lanes that are coded at once on a CPU, so that what is between steps stays in its cache
STEPS = 64  # likewise
AHEAD = 1024  # lanes from which on NumPy lets another thread look up what the next steps need


def lanes_of(tokens: int) -> tuple[int, int]:
    """How many lanes a stream of so many tokens has, and the turns of each: two or more, or one of a single token."""
    lanes = min(LANES, -(-tokens // 2))
    return lanes, -(-tokens // lanes)


def _groups(streams: int, lanes: int) -> list[slice]:
    size = max(1, TOGETHER // max(lanes, 1))
    return [slice(start, start + size) for start in range(0, streams, size)]


def encode(rows: torch.Tensor, tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write numbers down.

    Parameters
    ----------
    rows : torch.Tensor of int, [rows, streams, turns, lanes]
        Of every number its row in the tables' `entries`; a lane is read by rows, and by turns in these.

    Returns
    -------
    words : np.ndarray of uint16, [words]
        Of one stream after the other.
    counts : np.ndarray of int, [streams]
        Words of each.
    states : np.ndarray of int32, [streams, lanes]
        What the lanes begin with when they are read.
    """
    if on_gpu(rows):
        from spectral_kv.at_rest import ans_kernels

        return ans_kernels.encode(rows, tables)
    rows, streams, lanes = rows.cpu().numpy(), rows.shape[1], rows.shape[3]
    _ = tables.entries, tables.inverses  # made once, before threads ask for them
    parts = each(lambda part: _encode(rows[:, part], tables), _groups(streams, lanes))
    words = [x for some, _ in parts for x in some]
    states = [np.zeros((0, lanes), dtype=np.int32), *(x for _, x in parts)]
    counts = np.array([len(x) for x in words], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype=np.uint16), *words]), counts, np.concatenate(states)


class _Steps:
    """What is looked up of the numbers of some steps, in memory that is used again."""

    def __init__(self, size: int, lanes: int):
        self.rows = np.empty((size, lanes), dtype=np.intp)
        self.most, self.before, self.rest = (np.empty((size, lanes), dtype=np.int32) for _ in range(3))
        self.inverse = np.empty((size, lanes), dtype=np.float64)
        self.states = np.empty((size, lanes), dtype=np.int32)

    def look_up(self, steps: np.ndarray, tables: Tables) -> "_Steps":
        """Largest states below, what is before, left of and beside numbers of rows `[rows, turns, streams, lanes]`."""
        np.copyto(self.rows[: steps.shape[0] * steps.shape[1]].reshape(steps.shape), steps)
        tables.entries.take(self.rows, out=self.before, mode="clip")
        np.bitwise_and(self.before, 0xFFFF, out=self.rest)
        self.before >>= 16
        np.left_shift(self.rest, ROOM, out=self.most)
        self.most -= 1  # which wraps around to the largest of all
        np.subtract(WHOLE, self.rest, out=self.rest)
        tables.inverses.take(self.rows, out=self.inverse, mode="clip")
        return self

    def words(self, count: int, streams: int) -> tuple[np.ndarray, np.ndarray]:
        """Words that leave the states before `count` steps, of one stream after the other, and how many of each."""
        lanes = self.states.shape[1] // streams
        there, most = (x[:count].reshape(-1, streams, lanes) for x in (self.states, self.most))
        full, low = (np.empty((streams, count, lanes), dtype=kind) for kind in (bool, np.uint16))
        np.greater(there, most, out=full.swapaxes(0, 1))
        np.copyto(low, there.swapaxes(0, 1), casting="unsafe")
        at = np.flatnonzero(full)
        return low.ravel().take(at), np.searchsorted(at, np.arange(1, streams) * (count * lanes))


def _encode(rows: np.ndarray, tables: Tables) -> tuple[list[np.ndarray], np.ndarray]:
    """Words of every stream, and states."""
    count, streams, turns, lanes = rows.shape
    steps, size, found = rows.swapaxes(1, 2), max(1, STEPS // turns), []
    state = np.full(streams * lanes, LOW, dtype=np.int32)
    small, quotient, wide = np.empty_like(state), np.empty_like(state), np.empty(len(state), dtype=np.float64)
    stops = range(count, 0, -size)
    with Ahead(len(state) >= AHEAD) as ahead:
        room = [_Steps(size * turns, len(state)) for _ in stops[:2]]
        parts = [steps[max(stop - size, 0) : stop] for stop in stops]
        looked, written = (ahead(room[0].look_up, parts[0], tables) if parts else None), None
        for index, part in enumerate(parts):
            own = looked()
            if written is not None:
                found.append(written())
            if index + 1 < len(parts):
                looked = ahead(room[(index + 1) % 2].look_up, parts[index + 1], tables)
            there = len(part) * turns
            for step in reversed(range(there)):
                own.states[step] = state
                np.subtract(own.most[step], state, out=small)
                small >>= 31
                small &= BITS
                np.right_shift(state, small, out=small)
                np.copyto(wide, small)
                wide *= own.inverse[step]
                np.copyto(quotient, wide, casting="unsafe")
                quotient *= own.rest[step]
                small += quotient
                np.add(small, own.before[step], out=state)
            written = ahead(own.words, there, streams)
        if parts:
            found.append(written())
    split = [np.split(*x) for x in reversed(found)]
    words = [np.concatenate([some[i] for some in split] or [np.zeros(0, np.uint16)]) for i in range(streams)]
    return words, state.reshape(streams, lanes)


def decoder(
    words: np.ndarray, starts: np.ndarray, states: np.ndarray, beside: torch.Tensor
) -> Callable[[torch.Tensor, Tables], torch.Tensor]:
    """A `Decoder` on the device of `beside`: it takes contexts and returns numbers there."""
    if on_gpu(beside):
        from spectral_kv.at_rest import ans_kernels

        return ans_kernels.Decoder(words, starts, states, beside.device)
    return Decoder(words, starts, states)


class Decoder:
    """Streams that are read from their beginning, in as many parts as one likes.

    Parameters
    ----------
    words : np.ndarray of uint16, [words]
    starts : np.ndarray of int, [streams]
        Where in these each begins.
    states : np.ndarray of int32, [streams, lanes]
    """

    def __init__(self, words: np.ndarray, starts: np.ndarray, states: np.ndarray):
        self.words = np.append(words, np.uint16(0)).astype(np.int32)
        self.at, self.states = np.array(starts, dtype=np.int64), np.array(states, dtype=np.int32)

    def __call__(self, contexts: torch.Tensor, tables: Tables) -> torch.Tensor:
        """The next numbers, int16 `[rows, streams, turns, lanes]`, in contexts of this shape."""
        device, contexts = contexts.device, contexts.cpu().numpy()
        found = np.empty(contexts.shape, dtype=np.int16)
        _ = tables.numbers, tables.slots  # made once, before threads ask for them
        each(lambda part: self._part(contexts[:, part], found[:, part], part, tables), _groups(*self.states.shape))
        return torch.from_numpy(found).to(device)

    def _part(self, contexts: np.ndarray, found: np.ndarray, part: slice, tables: Tables) -> None:
        count, streams, turns, lanes = contexts.shape
        state, position = self.states[part].ravel(), self.at[part].copy()
        at, low, entry = np.empty(state.shape, dtype=np.intp), np.empty(state.shape, dtype=bool), np.empty_like(state)
        size, last = max(1, STEPS // turns), len(self.words) - 1
        for start in range(0, count, size):
            base = contexts[start : start + size].swapaxes(1, 2).reshape(-1, streams * lanes).astype(np.intp)
            base <<= PRECISION
            numbers = np.empty(base.shape, dtype=np.int16)
            for step in range(len(base)):
                np.bitwise_and(state, WHOLE - 1, out=entry)
                np.add(entry, base[step], out=at)
                tables.numbers.take(at, out=numbers[step], mode="clip")
                tables.slots.take(at, out=entry, mode="clip")
                state >>= PRECISION
                state *= entry & 0xFFFF
                entry >>= 16
                state += entry
                np.less(state, LOW, out=low)
                which = np.flatnonzero(low)
                if len(which):
                    stream = which // lanes
                    many = np.bincount(stream, minlength=streams)
                    ahead = position - (np.cumsum(many) - many)
                    taken = self.words.take(np.minimum(ahead.take(stream) + np.arange(len(which)), last))
                    state[which] = state.take(which) << BITS | taken
                    position += many
            found[start : start + size] = numbers.reshape(-1, turns, streams, lanes).swapaxes(1, 2)
        self.states[part], self.at[part] = state.reshape(streams, lanes), position
