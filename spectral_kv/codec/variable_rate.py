"""Components in as many bits as they need: one step for all, and an entropy coder that knows how large to expect them.

Under the metric of the bases an error costs the same in every component, so that all are rounded with one step (reverse
water-filling: what is far below the step takes almost no bits). How large a number will be is told by two logarithms,
in quarters of a factor of 2: that of its component over all tokens, and that of its token over the block's components.
Their sum is the context of the entropy coder. A number is rounded down where that saves more bits than it costs
(rate-distortion optimised quantisation), and stands for the mean of what was rounded to it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectral_kv.codec.entropy import Tables, entropy, histogram

OCTAVE = 4  # steps of a scale a factor of 2
CONTEXTS = 64
ZERO = 28  # level of components whose deviation is the step
GAIN = 12  # largest logarithm of a token's scale in a band: a factor of 8
SLOPE = np.log(2) / 6  # squared error, in squares of the step, that a bit is worth where rounding is at its best
MEANS = 240  # of what is rounded to a number, in 8 bits: from 0.5 below it to 0.5625 above


@dataclass(frozen=True)
class Sizes:
    """How large the components of a cache are.

    Parameters
    ----------
    levels : np.ndarray of uint8, [components]
        Logarithms of their root mean square, in steps; 0 for those that are zero in all tokens.
    gains : np.ndarray of int8, [tokens, blocks]
        Logarithms of a token's, relative to that of the components.
    block : np.ndarray of int, [components]
        Which a component belongs to.
    """

    levels: np.ndarray
    gains: np.ndarray
    block: np.ndarray

    @cached_property
    def there(self) -> np.ndarray:
        """Components that are not zero in all tokens, `[there]`."""
        return np.flatnonzero(self.levels)

    def contexts(self) -> np.ndarray:
        """Of the components that are there, uint8 `[tokens, there]`."""
        sums = self.levels.astype(np.int8)[self.there] + self.gains.take(self.block[self.there], axis=1)
        return np.clip(sums, 0, CONTEXTS - 1).astype(np.uint8)


class Rounding:
    """The least size, in steps, that is rounded to 1, and how far below a larger number it begins, by level."""

    def __init__(self):
        self.least = np.full(CONTEXTS, 0.6, dtype=np.float32)
        self.below = np.full(CONTEXTS, 0.45, dtype=np.float32)

    def learn(self, frequencies: np.ndarray) -> None:
        """From a `histogram` of what was rounded before: a number is worth its bits or gives way to the one below."""
        n = frequencies + 0.5
        bits = -np.log2(n / n.sum(axis=1, keepdims=True))
        bits[:, 1:] += 1  # signs
        self.least = (0.5 + 0.5 * SLOPE * np.clip(bits[:, 1] - bits[:, 0], 0, 9)).astype(np.float32)
        self.below = (0.5 - 0.5 * SLOPE * np.clip(bits[:, 2] - bits[:, 1], 0, 3)).astype(np.float32)

    def __call__(self, components: np.ndarray, step: float, levels: np.ndarray) -> np.ndarray:
        """Whole numbers, int32 `[tokens, components]`."""
        size = np.abs(components)
        size *= np.float32(1 / step)
        number = np.floor(size + self.below[levels])
        number *= size >= self.least[levels]
        return np.copysign(number, components, out=number).astype(np.int32)


class Components:
    """Components of a cache on their way into codes.

    Parameters
    ----------
    blocks : list of np.ndarray, [tokens, components]
        Of every block of the bases, by falling variance.
    """

    def __init__(self, blocks: list[np.ndarray]):
        self.values = np.concatenate(blocks, axis=1)
        self.block = np.repeat(np.arange(len(blocks)), [y.shape[1] for y in blocks])
        self._last: tuple[float, Rounded] | None = None

    @cached_property
    def _logarithms(self) -> np.ndarray:
        """Of the root mean square of every component."""
        return OCTAVE * 0.5 * np.log2(np.maximum((self.values**2).mean(axis=0), 1e-30))

    @cached_property
    def _largest(self) -> np.ndarray:
        """Of every component."""
        return np.maximum(self.values.max(axis=0), -self.values.min(axis=0))

    @cached_property
    def _gains(self) -> np.ndarray:
        weights = np.zeros((len(self.block), self.block.max() + 1), dtype=np.float32)
        weights[np.arange(len(self.block)), self.block] = 2.0 ** (-2 * self._logarithms / OCTAVE)
        power = (self.values**2) @ (weights / np.bincount(self.block)).astype(np.float32)
        return np.clip(np.rint(OCTAVE * 0.5 * np.log2(np.maximum(power, 1e-9))), -GAIN, GAIN).astype(np.int8)

    def every(self, stride: int) -> "Components":
        """Every so many tokens alone, with the sizes that all have."""
        part = Components([self.values[::stride]])
        part.block, part._largest = self.block, self._largest
        part._logarithms, part._gains = self._logarithms, self._gains[::stride]
        return part

    def levels(self, step: float) -> np.ndarray:
        """Logarithms of the sizes of components, uint8 `[components]`; 0 for those that are nothing in such steps."""
        levels = np.clip(np.rint(self._logarithms - OCTAVE * np.log2(step)) + ZERO, 1, CONTEXTS - 1)
        return np.where(self._largest < 0.5 * step, 0, levels).astype(np.uint8)

    def cost(self, step: float) -> float:
        """Squared error and bits of a token in one unit, in which no step is better than another for its bits."""
        some = self.every(len(self.values) // 512 | 1)
        rounded = some.rounded(step)
        return rounded.distortion(some.values, step) + SLOPE * step**2 * rounded.bits / len(some.values)

    def rounded(self, step: float) -> "Rounded":
        """As whole numbers of steps."""
        if self._last is None or self._last[0] != step:
            self._last = step, self._rounded(step)
        return self._last[1]

    def _rounded(self, step: float) -> "Rounded":
        sizes, rounding = Sizes(self.levels(step), self._gains, self.block), Rounding()
        components, levels = self.values.take(sizes.there, axis=1), sizes.levels[sizes.there]
        few = slice(None, None, len(components) // 256 | 1)  # enough to learn from
        each = np.broadcast_to(levels, components[few].shape)
        for _ in range(2):
            numbers = rounding(components[few], step, levels)
            rounding.learn(histogram(numbers, each, CONTEXTS))
        numbers = rounding(components, step, levels)
        return Rounded(sizes, numbers, means(components[few], numbers[few], levels, step))


def means(components: np.ndarray, numbers: np.ndarray, levels: np.ndarray, step: float) -> np.ndarray:
    """How much the mean of what is rounded to 1, and to larger numbers, lies above them, in steps.

    In 8 bits by level, uint8 `[2, contexts]`.
    """
    found = np.zeros((2, CONTEXTS))
    number = np.abs(numbers)
    beyond = np.abs(components) * np.float32(1 / step) - number
    for row, there in enumerate((number == 1, number > 1)):
        sums, counts = ((x * there).sum(axis=0) for x in (beyond, there))
        found[row] = np.bincount(levels, sums, CONTEXTS) / np.maximum(np.bincount(levels, counts, CONTEXTS), 1)
    return np.clip(np.rint((found + 0.5) * MEANS), 0, 255).astype(np.uint8)


def values(numbers: np.ndarray, levels: np.ndarray, means: np.ndarray, step: float) -> np.ndarray:
    """Components, float32 `[tokens, components]`, that numbers stand for."""
    of_one, of_more = means.astype(np.float32)[:, levels] / MEANS - 0.5
    beyond = np.where(np.abs(numbers) == 1, of_one, of_more)
    return (numbers + np.sign(numbers) * beyond) * np.float32(step)


@dataclass(frozen=True)
class Rounded:
    """Whole numbers of steps.

    Parameters
    ----------
    sizes : Sizes
    numbers : np.ndarray of int32, [tokens, there]
        Of the components whose level is not 0.
    means : np.ndarray of uint8, [2, contexts]
        See `means`.
    """

    sizes: Sizes
    numbers: np.ndarray
    means: np.ndarray

    @cached_property
    def contexts(self) -> np.ndarray:
        return self.sizes.contexts()

    @cached_property
    def frequencies(self) -> np.ndarray:
        return histogram(self.numbers, self.contexts, CONTEXTS)

    @cached_property
    def gain_frequencies(self) -> np.ndarray:
        gains = self.sizes.gains
        return histogram(gains, np.zeros(gains.shape, dtype=np.uint8), 1)

    @property
    def bits(self) -> float:
        """What an entropy coder takes."""
        return entropy(self.frequencies) + entropy(self.gain_frequencies)

    @property
    def order_0(self) -> float:
        """Bits if every component were coded on its own, each with its own frequencies."""
        columns = np.broadcast_to(np.arange(self.numbers.shape[1]), self.numbers.shape)
        return entropy(histogram(self.numbers, columns, self.numbers.shape[1]))

    def distortion(self, components: np.ndarray, step: float) -> float:
        """Mean squared error of a token's components `[tokens, components]`."""
        found = np.zeros_like(components)
        found[:, self.sizes.there] = values(self.numbers, self.sizes.levels[self.sizes.there], self.means, step)
        return float(((components - found) ** 2).sum(axis=1).mean())


@dataclass(frozen=True)
class VariableRate:
    """Components in codes, in chunks of tokens of which each can be read on its own.

    Parameters
    ----------
    step : float
    chunk : int
        Tokens of a chunk.
    levels : np.ndarray of uint8, [components]
    means : np.ndarray of uint8, [2, contexts]
    tables, gain_tables : Tables
    words : np.ndarray of uint32
        Of one chunk after the other, the gains of its tokens before the numbers.
    ends : np.ndarray of uint32, [chunks, 2]
        Where either end.
    """

    step: float
    chunk: int
    levels: np.ndarray
    means: np.ndarray
    tables: Tables
    gain_tables: Tables
    words: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, components: Components, step: float, chunk: int) -> "VariableRate":
        rounded = components.rounded(step)
        tables, gain_tables = Tables.of(rounded.frequencies), Tables.of(rounded.gain_frequencies)
        words, gains = [], rounded.sizes.gains
        for start in range(0, len(gains), chunk):
            part = slice(start, start + chunk)
            words.append(gain_tables.encode(gains[part].ravel(), np.zeros(gains[part].size, dtype=np.uint8)))
            words.append(tables.encode(rounded.numbers[part].ravel(), rounded.contexts[part].ravel()))
        ends = np.cumsum([len(w) for w in words]).astype(np.uint32).reshape(-1, 2)
        levels = rounded.sizes.levels
        return cls(step, chunk, levels, rounded.means, tables, gain_tables, np.concatenate(words), ends)

    def decode(self, tokens: int, block: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Components, float32 `[stop - start, components]`, of `tokens` in all; only their chunks are read.

        `block` says which one each of the components belongs to.
        """
        parts = []
        for index in range(start // self.chunk, -(-stop // self.chunk)):
            first = index * self.chunk
            count = min(self.chunk, tokens - first)
            begin = self.ends[index - 1, 1] if index else 0
            middle, end = self.ends[index]
            none = np.zeros(count * (block.max() + 1), dtype=np.uint8)
            gains = self.gain_tables.decode(self.words[begin:middle], none).reshape(count, -1)
            sizes = Sizes(self.levels, gains.astype(np.int8), block)
            contexts = sizes.contexts()
            numbers = self.tables.decode(self.words[middle:end], contexts.ravel()).reshape(contexts.shape)
            part = np.zeros((count, len(self.levels)), dtype=np.float32)
            part[:, sizes.there] = values(numbers, self.levels[sizes.there], self.means, self.step)
            parts.append(part[max(start - first, 0) : stop - first])
        return np.concatenate(parts)
