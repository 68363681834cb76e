"""Components in as many bits as they need: one step for all, and an entropy coder that knows how large to expect them.

Under the metric of the bases an error costs the same in every component, so that all are rounded with one step (reverse
water-filling: what is far below the step takes almost no bits). How large a number will be is told by two logarithms,
in quarters of a factor of 2: that of its component over all tokens, and that of its token over the block's components.
Their sum is the context of the entropy coder. A number is rounded down where that saves more bits than it costs
(rate-distortion optimised quantisation), and stands for the mean of what was rounded to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectral_kv.codec.entropy import Tables, entropy, histogram, with_zeros
from spectral_kv.codec.threads import each

OCTAVE = 4  # steps of a scale a factor of 2
CONTEXTS = 64
ZERO = 28  # level of components whose deviation is the step
GAIN = 12  # largest logarithm of a token's scale in a band: a factor of 8
SLOPE = np.log(2) / 6  # squared error, in squares of the step, that a bit is worth where rounding is at its best
ROWS = 256  # tokens that are rounded at a time, so that what comes between stays in a CPU's cache
PART = 2**16  # numbers, likewise
FINEST = 2**24  # whole numbers that single precision tells apart
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
        sums = np.empty((len(self.gains), len(self.there)), dtype=np.int8)
        edges = np.searchsorted(self.block[self.there], np.arange(self.gains.shape[1] + 1))
        levels = self.levels.astype(np.int8)[self.there]
        for index, part in enumerate(map(slice, edges[:-1], edges[1:])):
            np.add(levels[part], self.gains[:, index : index + 1], out=sums[:, part])
        return np.clip(sums, 0, CONTEXTS - 1, out=sums).view(np.uint8)

    @cached_property
    def often(self) -> np.ndarray:
        """How often every context is met, `[contexts]`."""
        found = np.zeros(CONTEXTS, dtype=np.int64)
        for index, gains in enumerate(self.gains.T):
            own = self.levels[self.there][self.block[self.there] == index]
            levels = np.bincount(own, minlength=CONTEXTS)
            for gain, count in enumerate(np.bincount(gains + GAIN, minlength=2 * GAIN + 1), -GAIN):
                np.add.at(found, np.clip(np.arange(CONTEXTS) + gain, 0, CONTEXTS - 1), levels * count)
        return found


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

    def __call__(self, components: np.ndarray, step: float, levels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows and columns where components `[tokens, components]` are not rounded to 0, and the numbers there, int32.

        Most are, and all whose component is of level 0. To round them too costs less than to pick out the others first.
        """
        inverse, below = np.float32(1 / step), self.below[levels]
        least = np.where(levels, self.least[levels], np.float32(np.inf))

        def part_from(start: int) -> tuple[np.ndarray, ...]:
            part = components[start : start + ROWS]
            size = np.abs(part)
            size *= inverse
            there = size >= least
            size += below
            there &= size >= 1
            at = np.flatnonzero(there)
            row, column = taken_apart(at.astype(np.int32), len(levels))
            number = np.copysign(np.floor(size.ravel()[at]), part.ravel()[at])
            return row + start, column, number.astype(np.int32)

        found = each(part_from, range(0, len(components), ROWS))
        return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def taken_apart(at: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of places in an array with rows of a width."""
    row = at // width
    return row, at - row * width


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
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the root mean square of every component, and of every token over each block's."""
        squares = np.einsum("tc,tc->c", self.values, self.values) / len(self.values)
        logarithms = OCTAVE * 0.5 * np.log2(np.maximum(squares, 1e-30))
        weights = np.zeros((len(self.block), self.block.max() + 1), dtype=np.float32)
        weights[np.arange(len(self.block)), self.block] = 2.0 ** (-2 * logarithms / OCTAVE)
        weights /= np.bincount(self.block)
        parts = (self.values[start : start + ROWS] for start in range(0, len(self.values), ROWS))
        power = np.concatenate([part**2 @ weights for part in parts])
        gains = np.clip(np.rint(OCTAVE * 0.5 * np.log2(np.maximum(power, 1e-9))), -GAIN, GAIN)
        return logarithms, gains.astype(np.int8)

    @property
    def deviations(self) -> np.ndarray:
        """Root mean square of every component."""
        return 2.0 ** (self._sizes[0] / OCTAVE)

    @cached_property
    def _largest(self) -> np.ndarray:
        """Of every component."""
        largest = np.maximum(self.values.max(axis=0), -self.values.min(axis=0))
        if not np.isfinite(largest).all():
            raise ValueError("some keys or values are not finite: run the model in bfloat16 or float32")
        return largest

    def every(self, stride: int) -> "Components":
        """Every so many tokens alone, with the sizes that all have."""
        part = Components([self.values[::stride]])
        logarithms, gains = self._sizes
        part.block, part._largest, part._sizes = self.block, self._largest, (logarithms, gains[::stride])
        return part

    def levels(self, step: float) -> np.ndarray:
        """Logarithms of the sizes of components, uint8 `[components]`; 0 for those that are nothing in such steps."""
        if self._largest.max() >= FINEST * step:
            raise ValueError(f"step={step:.3g} is finer than single precision: give a larger step, distortion or ratio")
        levels = np.clip(np.rint(self._sizes[0] - OCTAVE * np.log2(step)) + ZERO, 1, CONTEXTS - 1)
        return np.where(self._largest < 0.5 * step, 0, levels).astype(np.uint8)

    def cost(self, step: float) -> float:
        """Squared error and bits of a token in one unit, in which no step is better than another for its bits."""
        rounded = self.rounded(step)
        return rounded.distortion(self.values, step) + SLOPE * step**2 * rounded.bits / len(self.values)

    def rounded(self, step: float) -> "Rounded":
        """As whole numbers of steps."""
        if self._last is None or self._last[0] != step:
            self._last = step, self._rounded(step)
        return self._last[1]

    def _rounded(self, step: float) -> "Rounded":
        sizes, rounding = Sizes(self.levels(step), self._sizes[1], self.block), Rounding()
        levels, there = sizes.levels, sizes.there
        few = slice(None, None, len(self.values) // 256 | 1)  # enough to learn from
        some = self.values[few]
        often = np.bincount(levels[there], minlength=CONTEXTS) * len(some)
        for _ in range(2):
            _, column, number = rounding(some, step, levels)
            rounding.learn(with_zeros(histogram(number, levels[column], CONTEXTS), often))
        row, column, number = rounding(self.values, step, levels)
        own = np.flatnonzero(row // few.step * few.step == row)
        size, number_of_some = np.abs(self.values[row[own], column[own]]) * np.float32(1 / step), np.abs(number[own])
        found = means(size, number_of_some, levels[column[own]])
        return Rounded(sizes, row, (np.cumsum(levels > 0) - 1).astype(np.int32)[column], number, found)


def means(sizes: np.ndarray, numbers: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """How much the mean of the sizes that are rounded to 1, and to larger numbers, lies above them, all in steps.

    In 8 bits by level, uint8 `[2, contexts]`.
    """
    found = np.zeros((2, CONTEXTS))
    for row, there in enumerate((numbers == 1, numbers > 1)):
        sums, counts = (np.bincount(levels[there], x, CONTEXTS) for x in ((sizes - numbers)[there], None))
        found[row] = sums / np.maximum(counts, 1)
    return np.clip(np.rint((found + 0.5) * MEANS), 0, 255).astype(np.uint8)


def values(
    sizes: Sizes, row: np.ndarray, column: np.ndarray, numbers: np.ndarray, means: np.ndarray, step: float
) -> np.ndarray:
    """Components, float32 `[tokens, components]`, that are 0 but for what numbers stand for: see `Rounded`."""
    component = sizes.there[column]
    of_one, of_more = means.astype(np.float32)[:, sizes.levels[component]] / MEANS - 0.5
    beyond = np.where(np.abs(numbers) == 1, of_one, of_more)
    found = np.zeros((len(sizes.gains), len(sizes.levels)), dtype=np.float32)
    found[row, component] = (numbers + np.sign(numbers) * beyond) * np.float32(step)
    return found


class Places:
    """Where numbers of a chunk of tokens lie once they are in order: by context, of one token after the other.

    All of a token's components in a block have one gain, so that their order there is one of 25, and how many a token
    has of a context follows from its gains: nothing is sorted.
    """

    def __init__(self, sizes: Sizes):
        levels, block = sizes.levels.astype(np.int8)[sizes.there], sizes.block[sizes.there]
        self.blocks = sizes.gains.shape[1]
        self.rank = np.empty((2 * GAIN + 1, len(levels)), dtype=np.int32)
        self.counts = np.zeros((2 * GAIN + 1, self.blocks, CONTEXTS), dtype=np.int32)
        for index in range(self.blocks):
            own = np.flatnonzero(block == index)
            for row, gain in enumerate(range(-GAIN, GAIN + 1)):
                contexts = np.clip(levels[own] + gain, 0, CONTEXTS - 1)
                counts = np.bincount(contexts, minlength=CONTEXTS)
                order = np.argsort(contexts, kind="stable")
                before = np.cumsum(counts) - counts
                self.rank[row, own[order]] = np.arange(len(own)) - before[contexts[order]]
                self.counts[row, index] = counts

    def __call__(
        self, gains: np.ndarray, token: np.ndarray, block: np.ndarray, column: np.ndarray, context: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places of some numbers, and where each context begins and the last ends, `[contexts + 1]`.

        Parameters
        ----------
        gains : np.ndarray of int8, [tokens, blocks]
        token, block, column, context : np.ndarray of int, [n]
            Of the numbers.
        """
        gain = gains.astype(np.int32) + GAIN
        counts = self.counts[gain, np.arange(self.blocks)].reshape(-1, CONTEXTS)
        before = np.cumsum(counts, axis=0, dtype=np.int32) - counts
        edges = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
        before += edges[:-1].astype(np.int32)
        of = token * self.blocks + block
        width = self.rank.shape[1]
        found = before.ravel().take(of * CONTEXTS + context)
        found += self.rank.ravel().take(gain.ravel().take(of) * width + column)
        return found, edges


@dataclass(frozen=True)
class Rounded:
    """Whole numbers of steps.

    Parameters
    ----------
    sizes : Sizes
    row, column : np.ndarray of int
        Tokens, and components among those that are there, where a number is not 0.
    nonzero : np.ndarray of int32
        The numbers.
    means : np.ndarray of uint8, [2, contexts]
        See `means`.
    """

    sizes: Sizes
    row: np.ndarray
    column: np.ndarray
    nonzero: np.ndarray
    means: np.ndarray

    @cached_property
    def numbers(self) -> np.ndarray:
        """All of the components that are there, `[tokens, there]`, in as few bytes as they need."""
        small = np.abs(self.nonzero).max(initial=0) <= np.iinfo(np.int8).max
        found = np.zeros((len(self.sizes.gains), len(self.sizes.there)), dtype=np.int8 if small else np.int32)
        found[self.row, self.column] = self.nonzero
        return found

    @cached_property
    def _met(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks and contexts of the numbers."""
        levels, gains = self.sizes.levels.astype(np.int8)[self.sizes.there], self.sizes.gains
        block = self.sizes.block[self.sizes.there].astype(np.uint8)

        def part_from(start: int) -> tuple[np.ndarray, np.ndarray]:
            row, column = (x[start : start + PART] for x in (self.row, self.column))
            own, sums = block.take(column), levels.take(column)
            sums += gains.ravel().take(row * gains.shape[1] + own)
            return own, np.clip(sums, 0, CONTEXTS - 1, out=sums)

        found = each(part_from, range(0, len(self.row) or 1, PART))
        return tuple(np.concatenate(x) for x in zip(*found, strict=True))

    @cached_property
    def frequencies(self) -> np.ndarray:
        def part_from(start: int) -> np.ndarray:
            own = slice(start, start + PART)
            return histogram(self.nonzero[own], self._met[1][own], CONTEXTS)

        _ = self._met  # made once, before threads ask for it
        return with_zeros(sum(each(part_from, range(0, len(self.row) or 1, PART))), self.sizes.often)

    def ordered(self, chunk: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        """A function of the first token of a chunk: its numbers by context, int32, and where each context begins."""
        places, width = Places(self.sizes), len(self.sizes.there)
        block, context = self._met

        def of(start: int) -> tuple[np.ndarray, np.ndarray]:
            gains = self.sizes.gains[start : start + chunk]
            own = slice(*np.searchsorted(self.row, np.array([start, start + chunk], dtype=self.row.dtype)))
            at, edges = places(gains, self.row[own] - np.int32(start), block[own], self.column[own], context[own])
            found = np.zeros(len(gains) * width, dtype=np.int32)
            found[at] = self.nonzero[own]
            return found, edges

        return of

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
        count = len(self.sizes.there)
        found = histogram(self.nonzero, self.column, count)
        return entropy(with_zeros(found, np.full(count, len(self.sizes.gains))))

    def distortion(self, components: np.ndarray, step: float) -> float:
        """Mean squared error of a token's components `[tokens, components]`."""
        found = values(self.sizes, self.row, self.column, self.nonzero, self.means, step)
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
        sizes, ordered = rounded.sizes, rounded.ordered(chunk)
        _ = tables.models, gain_tables.models  # made once, before threads ask for them

        def words_from(start: int) -> list[np.ndarray]:
            gains = sizes.gains[start : start + chunk].ravel().astype(np.int32)
            return [
                gain_tables.encode_ordered(gains, np.array([0, len(gains)])),
                tables.encode_ordered(*ordered(start)),
            ]

        words = [x for two in each(words_from, range(0, len(sizes.gains), chunk)) for x in two]
        ends = np.cumsum([len(w) for w in words]).astype(np.uint32).reshape(-1, 2)
        return cls(step, chunk, sizes.levels, rounded.means, tables, gain_tables, np.concatenate(words), ends)

    def decode(self, tokens: int, block: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Components, float32 `[stop - start, components]`, of `tokens` in all; only their chunks are read.

        `block` says which one each of the components belongs to.
        """
        _ = self.tables.models, self.gain_tables.models  # made once, before threads ask for them

        def part_of(index: int) -> np.ndarray:
            first = index * self.chunk
            count = min(self.chunk, tokens - first)
            begin = self.ends[index - 1, 1] if index else 0
            middle, end = self.ends[index]
            none = np.zeros(count * (block.max() + 1), dtype=np.uint8)
            gains = self.gain_tables.decode(self.words[begin:middle], none).reshape(count, -1)
            sizes = Sizes(self.levels, gains.astype(np.int8), block)
            contexts = sizes.contexts()
            numbers = self.tables.decode(self.words[middle:end], contexts.ravel())
            at = np.flatnonzero(numbers)
            row, column = taken_apart(at, contexts.shape[1])
            part = values(sizes, row, column, numbers[at], self.means, self.step)
            return part[max(start - first, 0) : stop - first]

        return np.concatenate(each(part_of, range(start // self.chunk, -(-stop // self.chunk))))
