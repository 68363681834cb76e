"""Components in whole numbers of steps: one step for all, and how large an entropy coder is to expect each number.

Under the metric of the bases an error costs the same in every component, so that all are rounded with one step (reverse
water-filling: what is far below the step takes almost no bits). How large a number will be is told by two logarithms,
in quarters of a factor of 2: that of its component over all tokens, and that of its token over the block's components.
Their sum is the context of the entropy coder. A number is rounded down where that saves more bits than it costs
(rate-distortion optimised quantisation), and stands for the mean of what was rounded to it.

All is done by torch on the device on which the components lie, some components at a time on a CPU, so that what comes
between stays in its cache. What becomes of the numbers is said in `at_rest/variable_rate.py`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spectral_kv.at_rest.counting import counts, on_gpu, some_rows
from spectral_kv.at_rest.entropy import CAP, WIDTH, entropy, folded

OCTAVE = 4  # steps of a scale a factor of 2
CONTEXTS = 64  # of components
GAINS = CONTEXTS  # that of the tokens' scales
ZERO = 28  # level of components whose deviation is the step
GAIN = 12  # largest logarithm of a token's scale in a block: a factor of 8
SLOPE = np.log(2) / 6  # squared error, in squares of the step, that a bit is worth where rounding is at its best
MOST = 9.0, 3.0  # bits that 0 and smaller numbers save, as far as they are looked at
FINEST = 2**24  # whole numbers that single precision tells apart
LEARNT = 256  # tokens from which rounding is learnt, or more
MEANS = 240  # of what is rounded to a number, in 8 bits: from 0.5 below it to 0.5625 above


def on(values: np.ndarray, beside: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of components as a column on the device of `beside`."""
    return torch.from_numpy(values).to(beside.device, dtype)[:, None]


@dataclass(frozen=True)
class Sizes:
    """How large the components of a cache are.

    Parameters
    ----------
    levels : np.ndarray of uint8, [components]
        Logarithms of their root mean square, in steps; 0 for those that are zero in all tokens.
    gains : torch.Tensor of int8, [blocks, tokens]
        Logarithms of a token's, relative to that of the components.
    block : np.ndarray of int, [components]
        Which a component belongs to.
    """

    levels: np.ndarray
    gains: torch.Tensor
    block: np.ndarray

    @cached_property
    def there(self) -> np.ndarray:
        """Components that are not zero in all tokens, `[there]`."""
        return np.flatnonzero(self.levels)

    @property
    def placed(self) -> torch.Tensor:
        """Which components are there, their levels and blocks, int32 `[3, there]` on the device."""
        own = np.stack([self.there, self.levels[self.there], self.block[self.there]]).astype(np.int32)
        return torch.from_numpy(own).to(self.gains.device)

    @cached_property
    def _scaled(self) -> torch.Tensor:
        """The gains in rows of tables."""
        return self.gains.to(torch.int16) * WIDTH

    def contexts(self) -> torch.Tensor:
        """Of the components that are there, int8 `[there, tokens]`."""
        found = self.gains[torch.from_numpy(self.block[self.there]).to(self.gains.device)]
        return found.add_(on(self.levels[self.there], found, torch.int8)).clamp_(0, CONTEXTS - 1)

    def zeros(self, rows: slice) -> torch.Tensor:
        """Where 0 stands in tables, in contexts of some of the components that are there; int16 `[rows, tokens]`."""
        shape = len(self.there[rows]), self.gains.shape[1]
        return self.add_zeros(torch.zeros(shape, dtype=torch.int16, device=self.gains.device), rows)

    def add_zeros(self, numbers: torch.Tensor, rows: slice) -> torch.Tensor:
        """Numbers int16 `[rows, tokens]` as where they stand in tables: see `zeros`."""
        own = self.there[rows]
        levels, block = self.levels[own].astype(np.int16), self.block[own]
        if not len(own):
            return numbers
        column = on(levels * WIDTH + CAP, numbers, torch.int16)
        if levels.min() >= GAIN and levels.max() < CONTEXTS - GAIN:  # all contexts are those of sums
            numbers.add_(column)
            for index in np.unique(block):
                start, stop = np.searchsorted(block, [index, index + 1])
                numbers[start:stop].add_(self._scaled[index])
            return numbers
        found = self._scaled[torch.from_numpy(block).to(self.gains.device)].add_(column)
        return numbers.add_(found.clamp_(CAP, (CONTEXTS - 1) * WIDTH + CAP))


class Rounding:
    """The least size, in steps, that is rounded to 1, and how far below a larger number it begins, by level."""

    def __init__(self):
        self.least = np.full(CONTEXTS, 0.6, dtype=np.float32)
        self.below = np.full(CONTEXTS, 0.45, dtype=np.float32)

    @property
    def bounds(self) -> np.ndarray:
        """Both, float32 `[2, levels]`."""
        return np.stack([self.least, self.below])

    def learn(self, frequencies: np.ndarray) -> None:
        """From a `histogram` of what was rounded before: a number is worth its bits or gives way to the one below."""
        n = frequencies + 0.5
        bits = -np.log2(n / n.sum(axis=1, keepdims=True))
        bits[:, 1:] += 1  # signs
        self.least = (0.5 + 0.5 * SLOPE * np.clip(bits[:, 1] - bits[:, 0], 0, MOST[0])).astype(np.float32)
        self.below = (0.5 - 0.5 * SLOPE * np.clip(bits[:, 2] - bits[:, 1], 0, MOST[1])).astype(np.float32)

    def __call__(self, components: torch.Tensor, step: float, levels: np.ndarray) -> torch.Tensor:
        """Components `[components, tokens]` of such levels in whole steps, float32."""
        size = components.abs().mul_(float(np.float32(1 / step)))
        below = np.nextafter(self.least[levels], np.float32(0))  # by signs and not by comparisons, which take longer
        large = (size - on(below, size, torch.float32)).sign_().clamp_(min=0)
        return size.add_(on(self.below[levels], size, torch.float32)).floor_().mul_(large).copysign_(components)


class Components:
    """Components of a cache on their way into codes.

    Parameters
    ----------
    values : torch.Tensor of float32, [components, tokens]
        Those of one block after the other.
    block : np.ndarray of int, [components]
        Which each belongs to.
    """

    def __init__(self, values: torch.Tensor, block: np.ndarray):
        self.values, self.block = values, block
        self._last: tuple[float, Rounded] | None = None

    @property
    def tokens(self) -> int:
        return self.values.shape[1]

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """Logarithms of the root mean square of every component, and of every token over each block's; the largest.

        Of every component, as its square in single precision has it.
        """
        if on_gpu(self.values):
            return self._sizes_by_kernels()
        own = np.zeros((self.block.max() + 1, len(self.block)), dtype=np.float32)
        own[self.block, np.arange(len(self.block))] = 1
        own = torch.from_numpy(own / np.bincount(self.block)[:, None].astype(np.float32)).to(self.values.device)
        power, means, largest = self.values.new_zeros((len(own), self.tokens)), [], []
        for rows in some_rows(len(self.values), self.values):
            squares = self.values[rows].square()
            means.append(squares.mean(dim=1).clamp_(min=1e-30))
            largest.append(squares.amax(dim=1).sqrt_())
            power.addmm_(own[:, rows] / means[-1], squares)
        return self._in_logarithms(torch.stack([torch.cat(means), torch.cat(largest)]), power)

    def _sizes_by_kernels(self) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        from spectral_kv.at_rest import rounding_kernels

        own = rounding_kernels.sizes(self.values)
        own[0].clamp_(min=1e-30)
        share = torch.from_numpy((1 / np.bincount(self.block)[self.block]).astype(np.float32)).to(own.device)
        edges = np.searchsorted(self.block, np.arange(self.block.max() + 2))
        return self._in_logarithms(own, rounding_kernels.powers(self.values, share / own[0], edges))

    @staticmethod
    def _in_logarithms(own: torch.Tensor, power: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """Of mean squares and largest sizes `[2, components]`, and of the mean squares of tokens `[blocks, tokens]`."""
        gains = power.clamp_(min=1e-9).log2_().mul_(OCTAVE * 0.5).round_().clamp_(-GAIN, GAIN)
        means, largest = own.cpu().numpy()
        if not np.isfinite([means, largest]).all():
            raise ValueError(
                "some keys or values, or their squares, are not finite: run the model in bfloat16 or float32"
            )
        return OCTAVE * 0.5 * np.log2(means.astype(np.float64)), gains.to(torch.int8), largest

    @cached_property
    def _scales(self) -> np.ndarray:
        """`histogram` of the tokens' scales, `[1, CAP + 1]`."""
        met = counts(self._sizes[1] + GAIN, 2 * GAIN + 1)
        found = np.zeros((1, CAP + 1), dtype=np.int64)
        found[0, : GAIN + 1] = met[GAIN:]
        found[0, 1 : GAIN + 1] += met[GAIN - 1 :: -1]
        return found

    @property
    def deviations(self) -> np.ndarray:
        """Root mean square of every component."""
        return 2.0 ** (self._sizes[0] / OCTAVE)

    def every(self, stride: int) -> "Components":
        """Every so many tokens alone, with the sizes that all have."""
        part = Components(self.values[:, ::stride].contiguous(), self.block)
        logarithms, gains, largest = self._sizes
        part._sizes = logarithms, gains[:, ::stride].contiguous(), largest
        return part

    def levels(self, step: float) -> np.ndarray:
        """Logarithms of the sizes of components, uint8 `[components]`; 0 for those that are nothing in such steps."""
        largest = self._sizes[2]
        if largest.max() >= FINEST * step:
            raise ValueError(f"step={step:.3g} is finer than single precision: give a larger step, distortion or ratio")
        levels = np.clip(np.rint(self._sizes[0] - OCTAVE * np.log2(step)) + ZERO, 1, CONTEXTS - 1)
        return np.where(largest < 0.5 * step, 0, levels).astype(np.uint8)

    def cost(self, step: float) -> float:
        """Squared error and bits of a token in one unit, in which no step is better than another for its bits."""
        rounded = self.rounded(step)
        return rounded.distortion(self.values, step) + SLOPE * step**2 * rounded.bits / self.tokens

    def rounded(self, step: float) -> "Rounded":
        """As whole numbers of steps."""
        if self._last is None or self._last[0] != step:
            self._last = step, self._rounded(step)
        return self._last[1]

    def _rounded(self, step: float) -> "Rounded":
        sizes, every = Sizes(self.levels(step), self._sizes[1], self.block), self.tokens // LEARNT | 1
        blocks, there = len(sizes.gains), sizes.there
        rows = torch.empty((blocks + len(there), self.tokens), dtype=torch.int16, device=self.values.device)
        rows[:blocks].copy_(sizes.gains).add_(GAINS * WIDTH + CAP)
        if on_gpu(self.values):
            from spectral_kv.at_rest import rounding_kernels

            bounds = torch.from_numpy((rounding := Rounding()).bounds).to(rows.device)
            found = rounding_kernels.rounded(
                self.values, sizes.placed, sizes.gains, rows[blocks:], bounds, GAIN, float(np.float32(1 / step)),
                every, 0.5 * SLOPE, MOST,
            )  # fmt: skip
            met, (rounding.least, rounding.below) = found.cpu().numpy(), bounds.cpu().numpy()
        else:
            farthest = self._sizes[2][there]
            rounding = learnt(self.values[:, ::every][torch.from_numpy(there)], sizes.levels[there], step, farthest)
            met = fill(rows[blocks:], self.values, sizes, rounding, step, farthest)
        return Rounded(sizes, rows, np.concatenate([met, self._scales]), rounding, self.values, step, self._sizes[2])


def learnt(some: torch.Tensor, levels: np.ndarray, step: float, farthest: np.ndarray) -> Rounding:
    """How to round components of such levels, from some of their tokens, `[components, some]`; see `fill`."""
    rounding, gains = Rounding(), torch.zeros((1, some.shape[1]), dtype=torch.int8)
    alike = Sizes(levels, gains, np.zeros(len(levels), dtype=np.int64))
    rows = torch.empty(some.shape, dtype=torch.int16)
    for _ in range(2):
        rounding.learn(fill(rows, some, alike, rounding, step, farthest))
    return rounding


def fill(
    rows: torch.Tensor, values: torch.Tensor, sizes: Sizes, rounding: Rounding, step: float, farthest: np.ndarray
) -> np.ndarray:
    """Write where numbers stand in tables into rows int16 `[there, tokens]`, and return their `histogram`.

    Of values `[components, tokens]` of such sizes, no larger than those farthest from 0, `[there]`.
    """
    there, levels = sizes.there, sizes.levels[sizes.there]
    for part in some_rows(len(there), values):
        own = there[part]
        following = len(own) and own[-1] - own[0] == len(own) - 1
        some = values[own[0] : own[-1] + 1] if following else values[torch.from_numpy(own).to(rows.device)]
        numbers = rounding(some, step, levels[part])
        if farthest[part].max(initial=0) >= (CAP - 1) * step:
            numbers.clamp_(-CAP, CAP)
        sizes.add_zeros(rows[part].copy_(numbers), part)
    return folded(counts(rows, CONTEXTS * WIDTH).reshape(-1, WIDTH))


def means(sizes: torch.Tensor, numbers: torch.Tensor, levels: np.ndarray) -> np.ndarray:
    """How much the mean of the sizes that are rounded to 1, and to larger numbers, lies above them, all in steps.

    In 8 bits by level, uint8 `[2, contexts]`, of sizes and numbers `[components, tokens]` in such levels.
    """
    beyond = sizes - numbers
    more = (numbers - 1).clamp_(0, 1)  # 0 and 1, by what takes less long than comparisons
    there = [numbers.clamp(max=1).sub_(more), more]
    return mean_of(torch.stack([x.sum(dim=1) for own in there for x in (own * beyond, own)]).cpu().numpy(), levels)


def mean_of(sums: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`means` of sums and counts `[4, components]`, of ones and of larger numbers."""
    beyond, often = (np.stack([np.bincount(levels, x, CONTEXTS) for x in sums[start::2]]) for start in (0, 1))
    found = beyond / np.maximum(often, 1)
    return np.clip(np.rint((found + 0.5) * MEANS), 0, 255).astype(np.uint8)


def values(numbers: torch.Tensor, levels: np.ndarray, means: np.ndarray, step: float) -> torch.Tensor:
    """What whole numbers `[components, tokens]` of such levels stand for, float32: see `means`.

    Those in 16 bits are no farther from 0 than `CAP`, and are looked up.
    """
    if numbers.dtype == torch.int16 and not numbers.is_cuda:
        every = torch.arange(-CAP, CAP + 1, dtype=torch.int32).expand(CONTEXTS, WIDTH)
        table = values(every, np.arange(CONTEXTS), means, step)
        at = numbers.to(torch.int32).add_(on(levels.astype(np.int32) * WIDTH + CAP, numbers, torch.int32))
        return table.flatten().index_select(0, at.flatten()).view(numbers.shape)
    of_one, of_more = (on(x, numbers, torch.float32) for x in beyond_of(means)[:, levels])
    numbers = numbers.to(torch.float32)
    beyond = torch.where(numbers.abs() == 1, of_one, of_more).mul_(numbers.sign())
    return beyond.add_(numbers).mul_(float(np.float32(step)))


def stand_for(numbers: torch.Tensor, sizes: Sizes, means: np.ndarray, step: float) -> torch.Tensor:
    """`values` of numbers `[there, tokens]`, and zeros of what is not there, `[components, tokens]`."""
    found = torch.empty((len(sizes.levels), numbers.shape[1]), dtype=torch.float32, device=numbers.device)
    if on_gpu(numbers):
        from spectral_kv.at_rest import rounding_kernels

        beyond = torch.from_numpy(beyond_of(means)).to(numbers.device)
        place = np.full(len(found), -1)
        place[sizes.there] = np.arange(len(sizes.there))
        placed = torch.from_numpy(np.stack([place, sizes.levels]).astype(np.int32)).to(numbers.device)
        rounding_kernels.stand_for(numbers, placed, beyond, float(np.float32(step)), found)
        return found
    there = sizes.there
    found[torch.from_numpy(np.flatnonzero(sizes.levels == 0))] = 0
    at = torch.from_numpy(there)
    for part in some_rows(len(there), found):
        found[at[part]] = values(numbers[part], sizes.levels[there[part]], means, step)
    return found


def beyond_of(means: np.ndarray) -> np.ndarray:
    """How much farther from 0 than 1, and than larger numbers, what they stand for lies; float32 `[2, contexts]`."""
    return (means.astype(np.float32) / MEANS - 0.5).astype(np.float32)


@dataclass(frozen=True)
class Rounded:
    """Whole numbers of steps.

    Parameters
    ----------
    sizes : Sizes
    rows : torch.Tensor of int16, [blocks + there, tokens]
        Of the tokens' scales, then of the numbers of components that are there, no farther from 0 than `CAP`: where
        they stand in `Tables`.
    frequencies : np.ndarray of int, [contexts + 1, CAP + 1]
        `histogram` of the numbers, and of the tokens' scales in the last row.
    rounding : Rounding
    values : torch.Tensor of float32, [components, tokens]
        What was rounded,
    step : float
        to so many of these,
    largest : np.ndarray of float32, [components]
        and its largest magnitudes.
    """

    sizes: Sizes
    rows: torch.Tensor
    frequencies: np.ndarray
    rounding: Rounding
    values: torch.Tensor
    step: float
    largest: np.ndarray

    @cached_property
    def large(self) -> np.ndarray:
        """Components, of those that are there, which may have numbers from `CAP` on, `[large]`."""
        return np.flatnonzero(self.largest[self.sizes.there] >= (CAP - 1) * self.step)

    @cached_property
    def far(self) -> torch.Tensor:
        """All numbers of these, float32 `[large, tokens]`."""
        if not len(self.large):
            return self.values[:0]
        at = self.sizes.there[self.large]
        return self.rounding(self.values[torch.from_numpy(at).to(self.values.device)], self.step, self.sizes.levels[at])

    @cached_property
    def means(self) -> np.ndarray:
        """What numbers stand for, as some of the tokens say, uint8 `[2, contexts]`: see `means`."""
        there, every = self.sizes.there, self.values.shape[1] // LEARNT | 1
        if on_gpu(self.values):
            from spectral_kv.at_rest import rounding_kernels

            bounds = torch.from_numpy(self.rounding.bounds).to(self.values.device)
            inverse = float(np.float32(1 / self.step))
            sums = rounding_kernels.beyond(self.values, self.sizes.placed, bounds, inverse, every)
            return mean_of(sums.cpu().numpy(), self.sizes.levels[there])
        some = self.values[:, ::every]
        some, levels = some[torch.from_numpy(there).to(some.device)], self.sizes.levels[there]
        numbers = self.rounding(some, self.step, levels).abs_()
        return means(some.abs() * float(np.float32(1 / self.step)), numbers, levels)

    def numbers(self, rows: slice = slice(None)) -> torch.Tensor:
        """Of some of the components that are there, `[rows, tokens]`; int16 where none is farther from 0 than `CAP`."""
        found = self.rows[len(self.sizes.gains) :][rows] - self.sizes.zeros(rows)
        start, stop, _ = rows.indices(len(self.sizes.there))
        if len(own := np.flatnonzero((self.large >= start) & (self.large < stop))):
            found = found.to(torch.int32)
            found[torch.from_numpy(self.large[own] - start)] = self.far[torch.from_numpy(own)].to(torch.int32)
        return found

    @property
    def bits(self) -> float:
        """What an entropy coder takes."""
        return entropy(self.frequencies)

    @property
    def order_0(self) -> float:
        """Bits if every component were coded on its own, each with its own frequencies."""
        found = 0.0
        for index in range(len(self.sizes.there)):
            own = self.numbers(slice(index, index + 1)).abs_().clamp_(max=CAP)
            found += entropy(torch.bincount(own[0], minlength=CAP + 1).cpu().numpy()[None])
        return found

    def distortion(self, components: torch.Tensor, step: float) -> float:
        """Mean squared error of a token's components `[components, tokens]`."""
        if on_gpu(components):
            from spectral_kv.at_rest import rounding_kernels

            table = np.concatenate([self.rounding.bounds, beyond_of(self.means)])
            levels, table = (
                torch.from_numpy(x).to(components.device) for x in (self.sizes.levels.astype(np.int32), table)
            )
            inverse, unit = float(np.float32(1 / step)), float(np.float32(step))
            errors = rounding_kernels.errors(components, levels, table, inverse, unit)
            return float(errors.sum(dtype=torch.float64)) / components.shape[1]
        there = self.sizes.there
        gone = torch.from_numpy(np.flatnonzero(self.sizes.levels == 0)).to(components.device)
        error = components[gone].square().sum(dtype=torch.float64)
        at = torch.from_numpy(there).to(components.device)
        for part in some_rows(len(there), components):
            found = values(self.numbers(part), self.sizes.levels[there[part]], self.means, step)
            error += found.sub_(components[at[part]]).square_().sum(dtype=torch.float64)
        return float(error) / components.shape[1]

    def beyond(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """By how much numbers exceed `CAP`, uint32, of one chunk of tokens after the other, and how many each has."""
        chunks = -(-self.rows.shape[1] // chunk)
        if not len(self.large):
            return np.zeros(0, dtype=np.uint32), np.zeros(chunks, dtype=np.int64)
        at = torch.nonzero(self.far.abs() >= CAP)
        row, token = at.cpu().numpy().T
        size = self.far[at[:, 0], at[:, 1]].abs().cpu().numpy().astype(np.int64) - CAP
        order = np.lexsort((token, row, token // chunk))
        return size[order].astype(np.uint32), np.bincount(token // chunk, minlength=chunks)
