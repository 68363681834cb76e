"""Whole numbers in about the bits that their contexts say: one table of frequencies a context.

Numbers of one context are taken to be independent of one another, as likely as they are among all that are coded with
it, and as often below zero as above. A table holds these frequencies by magnitude, a logarithm in 8 bits each, which
costs less than a hundredth of a percent. Of numbers beyond `CAP` the rest is written in full elsewhere. What a coder
counts with are whole numbers that follow from the logarithms by whole numbers alone: see `at_rest/ans.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

CAP = 200  # magnitudes from here on share an entry of the table
WIDTH = 2 * CAP + 1  # numbers of a context
OCTAVE = 8  # steps of a frequency a factor of 2
PRECISION = 12  # bits of a frequency: costs a thousandth
WHOLE = 1 << PRECISION
ROOTS = np.rint(2.0 ** (np.arange(OCTAVE) / OCTAVE + 10)).astype(np.int64)  # far from halves


def histogram(numbers: np.ndarray, contexts: np.ndarray, count: int) -> np.ndarray:
    """How often every magnitude up to `CAP` is met in each of `count` contexts, `[count, CAP + 1]`."""
    at = (
        contexts.astype(np.int32).ravel() * (CAP + 1)
        + np.minimum(np.abs(numbers.astype(np.int32, copy=False)), CAP).ravel()
    )
    return np.bincount(at, minlength=count * (CAP + 1)).reshape(count, CAP + 1)


def folded(counts: np.ndarray) -> np.ndarray:
    """The `histogram` of numbers of which `counts` `[contexts, WIDTH]` says how often each is met, from -`CAP` on."""
    found = counts[:, CAP:].copy()
    found[:, 1:] += counts[:, CAP - 1 :: -1]
    return found


def entropy(frequencies: np.ndarray) -> float:
    """Bits of numbers with such a `histogram`, signs included, those beyond `CAP` in 32 bits more."""
    n = frequencies.astype(np.float64)
    total = n.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.where(n > 0, n * np.log2(n / total), 0.0).sum()
    return float(bits + n[:, 1:].sum() + 32 * n[:, CAP].sum())


@dataclass(frozen=True)
class Tables:
    """Frequencies of magnitudes in every context.

    Parameters
    ----------
    codes : np.ndarray of uint8, [entries]
        Of one context after the other: 0 for magnitudes that are never met, else a logarithm.
    lengths : np.ndarray of uint8, [contexts]
        Entries of each.
    """

    codes: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, frequencies: np.ndarray) -> "Tables":
        """The tables of a `histogram`."""
        lengths = np.where(frequencies.any(axis=1), CAP + 1 - np.argmax(frequencies[:, ::-1] > 0, axis=1), 0)
        used = np.concatenate([row[:n] for row, n in zip(frequencies, lengths, strict=True)])
        logarithms = np.minimum(1 + np.rint(OCTAVE * np.log2(np.maximum(used, 1))), 255)  # of 2**32 numbers and more
        return cls(np.where(used > 0, logarithms, 0).astype(np.uint8), lengths.astype(np.uint8))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.lengths.nbytes

    @cached_property
    def frequencies(self) -> np.ndarray:
        """Of every number from -`CAP` to `CAP`, int64 `[contexts + 1, WIDTH]`, `WHOLE` in all.

        The context behind the last knows nothing but 0, which takes no bits.
        """
        weights = np.zeros((len(self.lengths) + 1, WIDTH), dtype=np.int64)
        weights[-1, CAP] = 2
        at = np.arange(len(self.codes)) - np.repeat(
            np.cumsum(self.lengths, dtype=np.int64) - self.lengths, self.lengths
        )
        row, codes = np.repeat(np.arange(len(self.lengths)), self.lengths), self.codes.astype(np.int64)
        one = np.where(codes > 0, ROOTS[(codes - 1) % OCTAVE] << (codes - 1) // OCTAVE, 0)
        weights[row, CAP + at] = weights[row, CAP - at] = one
        weights[:, CAP] *= 2  # others share theirs with the number of the other sign
        total, there = weights.sum(axis=1, keepdims=True), weights > 0
        found = np.where(there, np.maximum(weights * WHOLE // np.maximum(total, 1), 1), 0)
        # what many rare numbers have beyond their share, the largest need not have to give: then shares are of the rest
        crowded = 4 * (found.sum(axis=1) - WHOLE) > 3 * found.max(axis=1)
        left = WHOLE - there.sum(axis=1, keepdims=True)
        found[crowded] = (there + weights * left // np.maximum(total, 1))[crowded]
        largest = found.argmax(axis=1)
        met = np.flatnonzero(total)
        found[met, largest[met]] += WHOLE - found[met].sum(axis=1)
        return found

    @cached_property
    def entries(self) -> np.ndarray:
        """Of every number its frequency, and above 16 bits those before it; int32 `[(contexts + 1) * WIDTH]`."""
        before = np.cumsum(self.frequencies, axis=1) - self.frequencies
        return (self.frequencies | before << 16).astype(np.int32).ravel()

    @cached_property
    def inverses(self) -> np.ndarray:
        """Of every number what states are multiplied by, and rounded down, to divide them by its frequency exactly."""
        return (1 + 2.0**-40) / np.maximum(self.entries & 0xFFFF, 1)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The number at each of `WHOLE` places of every context, int16 `[(contexts + 1) * WHOLE]`."""
        return self._at_places(np.broadcast_to(np.arange(-CAP, CAP + 1, dtype=np.int16), self.frequencies.shape))

    @cached_property
    def slots(self) -> np.ndarray:
        """Of the number at each place its frequency, and above 16 bits how far the place lies in it; as `numbers`."""
        entry = self._at_places(self.entries.reshape(-1, WIDTH))
        place = np.arange(len(entry), dtype=np.int32) & WHOLE - 1
        return entry & 0xFFFF | place - (entry >> 16) << 16

    def _at_places(self, of_numbers: np.ndarray) -> np.ndarray:
        """What belongs to numbers `[contexts + 1, WIDTH]` at the places of these, `[(contexts + 1) * WHOLE]`."""
        found, met = np.zeros((len(of_numbers), WHOLE), dtype=of_numbers.dtype), self.frequencies.any(axis=1)
        found[met] = np.repeat(of_numbers[met].ravel(), self.frequencies[met].ravel()).reshape(-1, WHOLE)
        return found.ravel()
