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
from spectral_kv.at_rest.threads import each

BITS = 16  # that leave a state at once
LOW = 1 << 15  # the smallest state between steps; the largest is below LOW << BITS
ROOM = 31 - PRECISION  # a number of a frequency can be added to states below it, shifted by so much
LANES = 128  # of a stream, at most: each costs the bytes of a state
TOGETHER = 4096  # lanes that are coded at once on a CPU, so that what is between steps stays in its cache
STEPS = 64  # likewise


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


def _encode(rows: np.ndarray, tables: Tables) -> tuple[list[np.ndarray], np.ndarray]:
    """Words of every stream, and states."""
    count, streams, turns, lanes = rows.shape
    steps, size, found = rows.swapaxes(1, 2), max(1, STEPS // turns), []
    states = np.full((size * turns + 1, streams * lanes), LOW, dtype=np.int32)
    small, quotient, wide = states[0].copy(), states[0].copy(), np.empty(streams * lanes, dtype=np.float64)
    for stop in range(count, 0, -size):
        some = steps[max(stop - size, 0) : stop].reshape(-1, streams * lanes).astype(np.intp)
        before = tables.entries.take(some)
        frequency = before & 0xFFFF
        before >>= 16
        most = (frequency << ROOM) - np.int32(1)  # which wraps around to the largest of all
        inverse = tables.inverses.take(some)
        rest = np.subtract(WHOLE, frequency, out=frequency)
        states[len(some)] = states[0]
        for step in reversed(range(len(some))):
            state, following = states[step + 1], states[step]
            np.subtract(most[step], state, out=small)
            small >>= 31
            small &= BITS
            np.right_shift(state, small, out=small)
            np.copyto(wide, small)
            wide *= inverse[step]
            np.copyto(quotient, wide, casting="unsafe")
            quotient *= rest[step]
            small += quotient
            np.add(small, before[step], out=following)
        there = states[1 : len(some) + 1]
        full = np.empty((streams, len(some), lanes), dtype=bool)
        np.greater(*(x.reshape(-1, streams, lanes) for x in (there, most)), out=full.swapaxes(0, 1))
        at = np.flatnonzero(full)
        stream, at = np.divmod(at, len(some) * lanes)
        words = there[at // lanes, stream * lanes + at % lanes].astype(np.uint16)
        found.append(np.split(words, np.searchsorted(stream, np.arange(1, streams))))
    words = [np.concatenate([some[i] for some in reversed(found)] or [np.zeros(0, np.uint16)]) for i in range(streams)]
    return words, states[0].reshape(streams, lanes)


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
