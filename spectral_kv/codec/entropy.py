"""Whole numbers in about the bits that their contexts say: one table a context, and an asymmetric numeral system.

Numbers of one context are taken to be independent of one another, as likely as they are among all that are coded with
it, and as often below zero as above. A table holds these frequencies by magnitude, a logarithm in 8 bits each, which
costs less than a hundredth of a percent. Numbers beyond `CAP` are written in full.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

CAP = 200  # magnitudes from here on share an entry of the table
OCTAVE = 8  # steps of a frequency a factor of 2
EXTRA = "at-rest"


def _library() -> Any:
    """The entropy coder, a compiled package that not everyone needs: the extra `EXTRA`."""
    from constriction import stream

    return stream


def histogram(numbers: np.ndarray, contexts: np.ndarray, count: int) -> np.ndarray:
    """How often every magnitude up to `CAP` is met in each of `count` contexts, `[count, CAP + 1]`."""
    at = (
        contexts.astype(np.int32).ravel() * (CAP + 1)
        + np.minimum(np.abs(numbers.astype(np.int32, copy=False)), CAP).ravel()
    )
    return np.bincount(at, minlength=count * (CAP + 1)).reshape(count, CAP + 1)


def with_zeros(frequencies: np.ndarray, often: np.ndarray) -> np.ndarray:
    """A `histogram` of what is not zero as that of all numbers, of which every context `[count]` has so many."""
    frequencies[:, 0] = often - frequencies[:, 1:].sum(axis=1)
    return frequencies


def entropy(frequencies: np.ndarray) -> float:
    """Bits of numbers with such a `histogram`, signs included, those beyond `CAP` in 32 bits more."""
    n = frequencies.astype(np.float64)
    total = n.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.where(n > 0, n * np.log2(n / total), 0.0).sum()
    return float(bits + n[:, 1:].sum() + 32 * n[:, CAP].sum())


def _edges(contexts: np.ndarray, count: int) -> np.ndarray:
    """Where numbers of each of `count` contexts begin, and the last end, once they are in order, `[count + 1]`."""
    return np.concatenate([[0], np.cumsum(np.bincount(contexts, minlength=count))])


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
        logarithms = 1 + np.rint(OCTAVE * np.log2(np.maximum(used, 1)))
        return cls(np.where(used > 0, logarithms, 0).astype(np.uint8), lengths.astype(np.uint8))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.lengths.nbytes

    @cached_property
    def models(self) -> list[Any]:
        """Of every context that is met, the coder's model of numbers from -length + 1 to length - 1; else None."""
        stream, made = _library(), []
        for part in np.split(self.codes, np.cumsum(self.lengths)[:-1]):
            if not len(part):
                made.append(None)
                continue
            weights = np.where(part > 0, np.rint(64 * 2.0 ** ((part.astype(np.float64) - 1) / OCTAVE)), 0.0)
            weights[1:] /= 2  # signs
            both = np.concatenate([weights[:0:-1], weights])
            if len(both) == 1:
                both = np.array([1.0, 0.0])  # a model has two entries at least
            made.append(stream.model.Categorical((both / both.sum()).astype(np.float32), perfect=False))
        return made

    def encode(self, numbers: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Words, uint32, of numbers `[n]` in contexts `[n]`."""
        ordered = numbers.take(np.argsort(contexts, kind="stable")).astype(np.int32, copy=False)
        return self.encode_ordered(ordered, _edges(contexts, len(self.lengths)))

    def encode_ordered(self, ordered: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """`encode`, of numbers int32 `[n]` by context, each of which has those from its edge `[contexts + 1]` on."""
        coder = _library().stack.AnsCoder()
        far = ordered[:0]
        if len(ordered) and max(ordered.max(), -int(ordered.min())) >= CAP:
            far = ordered[np.abs(ordered) >= CAP]
            ordered = np.clip(ordered, -CAP, CAP)
        for index in reversed(range(len(self.lengths))):
            part = ordered[edges[index] : edges[index + 1]]
            if len(part):
                coder.encode_reverse(part + np.int32(self.lengths[index] - 1), self.models[index])
        head = [len(far), *(np.abs(far) - CAP)]
        return np.concatenate([np.array(head, dtype=np.uint32), coder.get_compressed()])

    def decode(self, words: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """The numbers `[n]`, int32, that words stand for in contexts `[n]`."""
        count = int(words[0])
        beyond = words[1 : 1 + count].astype(np.int64)
        coder = _library().stack.AnsCoder(np.ascontiguousarray(words[1 + count :]))
        order, edges, parts = np.argsort(contexts, kind="stable"), _edges(contexts, len(self.lengths)), []
        for index, length in enumerate(self.lengths):
            if (many := int(edges[index + 1] - edges[index])) > 0:
                parts.append(coder.decode(self.models[index], many) - np.int32(length - 1))
        ordered = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        far = np.flatnonzero(np.abs(ordered) >= CAP)
        ordered[far] += (np.sign(ordered[far]) * beyond).astype(np.int32)
        numbers = np.empty(len(ordered), dtype=np.int32)
        numbers[order] = ordered
        return numbers
