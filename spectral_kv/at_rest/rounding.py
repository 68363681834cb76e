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
FINEST = 2**24  # whole numbers that single precision tells apart
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

    @cached_property
    def placed(self) -> tuple[torch.Tensor, ...]:
        """Which components are there, int64, their levels and blocks, int32, on the device; `[there]` each."""
        own = (self.there, self.levels[self.there].astype(np.int32), self.block[self.there].astype(np.int32))
        return tuple(torch.from_numpy(x).to(self.gains.device) for x in own)

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
        own = self.there[rows]
        found = self._scaled[torch.from_numpy(self.block[own]).to(self.gains.device)]
        found += on(self.levels[own].astype(np.int16) * WIDTH + CAP, found, torch.int16)
        return found.clamp_(CAP, (CONTEXTS - 1) * WIDTH + CAP)


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
        own = np.zeros((self.block.max() + 1, len(self.block)), dtype=np.float32)
        own[self.block, np.arange(len(self.block))] = 1
        own = torch.from_numpy(own / np.bincount(self.block)[:, None].astype(np.float32)).to(self.values.device)
        power, means, largest = self.values.new_zeros((len(own), self.tokens)), [], []
        for rows in some_rows(len(self.values), self.values):
            squares = self.values[rows].square()
            means.append(squares.mean(dim=1).clamp_(min=1e-30))
            largest.append(squares.amax(dim=1).sqrt_())
            power.addmm_(own[:, rows] / means[-1], squares)
        gains = power.clamp_(min=1e-9).log2_().mul_(OCTAVE * 0.5).round_().clamp_(-GAIN, GAIN)
        means, largest = (torch.cat(x).cpu().numpy() for x in (means, largest))
        if not np.isfinite(largest).all():
            raise ValueError("some keys or values are not finite: run the model in bfloat16 or float32")
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
        sizes, rounding = Sizes(self.levels(step), self._sizes[1], self.block), Rounding()
        there, levels = sizes.there, sizes.levels[sizes.there]
        some = self.values[:, :: self.tokens // 256 | 1]  # enough to learn from
        some = some[torch.from_numpy(there).to(some.device)]
        alike = Sizes(levels, self._sizes[1].new_zeros((1, some.shape[1])), np.zeros(len(there), dtype=np.int64))
        rows = torch.empty(some.shape, dtype=torch.int16, device=some.device)
        for _ in range(2):
            rounding.learn(fill(rows, some, alike, rounding, step))
        found = means(some.abs() * float(np.float32(1 / step)), rounding(some, step, levels).abs_(), levels)

        blocks = len(sizes.gains)
        rows = torch.empty((blocks + len(there), self.tokens), dtype=torch.int16, device=some.device)
        rows[:blocks].copy_(sizes.gains).add_(GAINS * WIDTH + CAP)
        met = np.concatenate([fill(rows[blocks:], self.values, sizes, rounding, step), self._scales])
        large = np.flatnonzero(self._sizes[2][there] >= (CAP - 1) * step)
        at = torch.from_numpy(there[large]).to(some.device)
        far = rounding(self.values[at], step, levels[large]) if len(large) else self.values[:0]
        return Rounded(sizes, rows, met, large, far, found)


def fill(rows: torch.Tensor, values: torch.Tensor, sizes: Sizes, rounding: Rounding, step: float) -> np.ndarray:
    """Write where numbers stand in tables into rows int16 `[there, tokens]`, and return their `histogram`.

    Of values `[components, tokens]` of such sizes.
    """
    there, levels = sizes.there, sizes.levels[sizes.there]
    if on_gpu(rows):
        from spectral_kv.at_rest.rounding_kernels import rounded

        bounds = (torch.from_numpy(x[levels]).to(rows.device) for x in (rounding.least, rounding.below))
        inverse = float(np.float32(1 / step))
        met = rounded(values, *sizes.placed, *bounds, sizes.gains, rows, CONTEXTS, GAIN, inverse)
        return met.cpu().numpy()
    at = torch.from_numpy(there).to(rows.device)
    for part in some_rows(len(there), values):
        numbers = rounding(values[at[part]], step, levels[part]).clamp_(-CAP, CAP)
        torch.add(sizes.zeros(part), numbers.to(torch.int16), out=rows[part])
    return folded(counts(rows, CONTEXTS * WIDTH).reshape(-1, WIDTH))


def means(sizes: torch.Tensor, numbers: torch.Tensor, levels: np.ndarray) -> np.ndarray:
    """How much the mean of the sizes that are rounded to 1, and to larger numbers, lies above them, all in steps.

    In 8 bits by level, uint8 `[2, contexts]`, of sizes and numbers `[components, tokens]` in such levels.
    """
    beyond = sizes - numbers
    there = [(numbers == 1).to(sizes.dtype), (numbers > 1).to(sizes.dtype)]
    sums = torch.stack([x.sum(dim=1) for own in there for x in (own * beyond, own)]).cpu().numpy()
    beyond, often = (np.stack([np.bincount(levels, x, CONTEXTS) for x in sums[start::2]]) for start in (0, 1))
    found = beyond / np.maximum(often, 1)
    return np.clip(np.rint((found + 0.5) * MEANS), 0, 255).astype(np.uint8)


def values(numbers: torch.Tensor, levels: np.ndarray, means: np.ndarray, step: float) -> torch.Tensor:
    """What whole numbers `[components, tokens]` of such levels stand for, float32: see `means`."""
    of_one, of_more = (on(x, numbers, torch.float32) for x in means.astype(np.float32)[:, levels] / MEANS - 0.5)
    numbers = numbers.to(torch.float32)
    beyond = torch.where(numbers.abs() == 1, of_one, of_more).mul_(numbers.sign())
    return beyond.add_(numbers).mul_(float(np.float32(step)))


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
    large : np.ndarray of int, [large]
        Components, of those that are there, which may have numbers from `CAP` on,
    far : torch.Tensor of float32, [large, tokens]
        and all numbers of these.
    means : np.ndarray of uint8, [2, contexts]
        See `means`.
    """

    sizes: Sizes
    rows: torch.Tensor
    frequencies: np.ndarray
    large: np.ndarray
    far: torch.Tensor
    means: np.ndarray

    def numbers(self, rows: slice = slice(None)) -> torch.Tensor:
        """Of some of the components that are there, int32 `[rows, tokens]`."""
        found = (self.rows[len(self.sizes.gains) :][rows] - self.sizes.zeros(rows)).to(torch.int32)
        start, stop, _ = rows.indices(len(self.sizes.there))
        if len(own := np.flatnonzero((self.large >= start) & (self.large < stop))):
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
        at = torch.nonzero(self.far.abs() >= CAP)
        row, token = at.cpu().numpy().T
        size = self.far[at[:, 0], at[:, 1]].abs().cpu().numpy().astype(np.int64) - CAP
        order = np.lexsort((token, row, token // chunk))
        return size[order].astype(np.uint32), np.bincount(token // chunk, minlength=chunks)
