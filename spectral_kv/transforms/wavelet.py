"""Wavelet transforms along tokens, decimated and stationary, and the way back from coefficients to token positions.

Filters are PyWavelets'; the transform itself is strided slices and sums, so that it runs where the keys live. The
decimated transform equals `pywt.wavedec`, the stationary one `pywt.swt`.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pywt
from scipy import sparse

from spectral_kv.xp import Array, blocks, constant, like, namespace, picked, weighted_sums

MODES = ("symmetric", "periodization")
TRANSFORMS = ("decimated", "stationary")
TILE = 8  # coefficients of one matrix product on a CPU


def _strides(transform: str, level: int) -> tuple[int, int]:
    """Tokens from one coefficient to the next, and from one filter tap to the next, in samples of the level's input.

    The decimated transform halves the signal; the stationary one keeps it and spreads the filter ("a trous").
    """
    return (2, 1) if transform == "decimated" else (1, 2**level)


def _filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Taps of the low-pass and the high-pass filter."""
    bank = pywt.Wavelet(wavelet)
    return tuple(bank.dec_lo), tuple(bank.dec_hi)


@lru_cache(maxsize=64)
def _extension(tokens: int, taps: tuple[float, ...], mode: str, step: int, dilation: int) -> tuple[np.ndarray, int]:
    """Source index of every sample the filter sees, and the number of coefficients.

    Coefficient o is `sum_j taps[j] * x[index[step * o + dilation * (len(taps) - 1 - j)]]`.
    """
    count = -(-tokens // step)
    if mode == "periodization":
        ahead = len(taps) // 2  # as PyWavelets aligns both transforms
    elif step == 2:
        ahead, count = 1, (tokens + len(taps) - 1) // 2
    else:  # on the filter's energy: with the centre of its taps db4 would hardly see the tokens of one end
        ahead = round(float(np.average(np.arange(len(taps)), weights=np.square(taps))))
    index = dilation * (ahead - len(taps) + 1) + np.arange(step * (count - 1) + dilation * (len(taps) - 1) + 1)
    if mode == "periodization":
        return np.minimum(index % (step * count), tokens - 1), count  # an odd sequence repeats its last sample
    folded = index % (2 * tokens)
    return np.where(folded < tokens, folded, 2 * tokens - 1 - folded), count


@lru_cache(maxsize=16)
def _taps(bank: tuple[tuple[float, ...], ...]) -> np.ndarray:
    """Taps `[filters, taps]` in double precision."""
    return np.asarray(bank, dtype=np.float64)


@lru_cache(maxsize=64)
def _tiles(
    tokens: int, bank: tuple[tuple[float, ...], ...], mode: str, dtype: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Filters of a decimated level as banded matrices `[filters, TILE, window]` over the rows under a tile.

    Also the source index of the rows of all tiles, and the number of coefficients.
    """
    index, count = _extension(tokens, bank[0], mode, 2, 1)
    window = 2 * TILE + len(bank[0]) - 2
    matrices = np.zeros((len(bank), TILE, window))
    for row in range(TILE):
        matrices[:, row, 2 * row : 2 * row + len(bank[0])] = np.asarray(bank)[:, ::-1]
    rows = np.minimum(np.arange(2 * TILE * (-(-count // TILE) - 1) + window), len(index) - 1)
    return matrices.astype(dtype), index[rows], count


def in_tiles(x: Array, transform: str) -> bool:
    """Whether a transform of `x` is computed in tiles of coefficients, which in torch takes a CPU the least time."""
    if transform != "decimated" or not hasattr(x, "detach") or x.is_cuda or x.requires_grad:
        return False
    return x.dtype in (namespace(x).float32, namespace(x).float64)


def _tiled(x: Array, bank: tuple[tuple[float, ...], ...], mode: str) -> list[Array]:
    """`_filter` of a decimated level in torch: products with windows of the rows, which nobody copies."""
    matrices, index, count = _tiles(x.shape[-2], bank, mode, str(x.dtype).removeprefix("torch."))
    extended = picked(x.reshape(-1, *x.shape[-2:]), constant(index, x), -2)
    windows = extended.unfold(-2, matrices.shape[-1], 2 * TILE).mT  # [..., tiles, window, dim]
    found = []
    for matrix in constant(matrices, x):
        out = x.new_empty((*windows.shape[:2], TILE, x.shape[-1]))
        for one, rows in zip(out, windows, strict=True):
            one.baddbmm_(matrix.expand(len(rows), *matrix.shape), rows, beta=0)
        found.append(out.flatten(1, 2)[:, :count].reshape(*x.shape[:-2], count, x.shape[-1]))
    return found


def _filter(x: Array, bank: tuple[tuple[float, ...], ...], mode: str, step: int, dilation: int) -> list[Array]:
    """Filters of one level, of one extension: coefficients `[..., coefficients, dim]` of `x` `[..., tokens, dim]` each.

    The shifted signals are gathered once for all filters, and one matrix product does the sums.
    """
    if step == 2 and in_tiles(x, "decimated"):
        return _tiled(x, bank, mode)
    xp = namespace(x)
    index, count = _extension(x.shape[-2], bank[0], mode, step, dilation)
    extended = picked(x, constant(index, x), -2)
    taps = len(bank[0])
    starts = [dilation * (taps - 1 - j) for j in range(taps)]
    shifted = xp.stack([extended[..., s : s + step * (count - 1) + 1 : step, :] for s in starts])
    filters = xp.astype(constant(_taps(bank), x), x.dtype)
    products = xp.matmul(filters, xp.reshape(shifted, (taps, -1)))
    return [xp.reshape(product, shifted.shape[1:]) for product in products]


def wavedec(x: Array, wavelet: str, levels: int, mode: str = "symmetric", transform: str = "decimated") -> list[Array]:
    """`[approximation, detail of the coarsest level, ..., detail of the finest]`.

    The order, and the values, of `pywt.wavedec` or of `pywt.swt(..., trim_approx=True, norm=False)`; unlike the
    latter, `stationary` takes any length and both modes.

    Parameters
    ----------
    x : array, [..., tokens, dim]
    wavelet : str
        Any discrete wavelet of PyWavelets, e.g. `db4`.
    levels : int
        Each level halves the resolution.
    mode : str
        `symmetric` or `periodization`, how the sequence, and the approximation at every level, goes on beyond its
        ends.
    transform : str
        `decimated` halves the number of coefficients at every level; `stationary` keeps one a token, so that a shift
        of the sequence shifts the coefficients. In `symmetric` mode each of its filters is centred on its energy.

    Raises
    ------
    ValueError
        For an unknown mode or transform.
    """
    if mode not in MODES:
        raise ValueError(f"wavelet mode {mode!r} is not known: choose one of {', '.join(MODES)}")
    if transform not in TRANSFORMS:
        raise ValueError(f"wavelet transform {transform!r} is not known: choose one of {', '.join(TRANSFORMS)}")
    bank = _filters(wavelet)
    apart = transform == "stationary" and mode == "symmetric"  # each filter is centred on its own energy
    details = []
    for level in range(levels):
        strides = _strides(transform, level)
        if apart:
            x, detail = (_filter(x, (taps,), mode, *strides)[0] for taps in bank)
        else:
            x, detail = _filter(x, bank, mode, *strides)
        details.append(detail)
    return [x, *reversed(details)]


def _filter_matrix(tokens: int, taps: tuple[float, ...], mode: str, step: int, dilation: int) -> sparse.csr_matrix:
    """One filter as a matrix `[coefficients, tokens]`."""
    index, count = _extension(tokens, taps, mode, step, dilation)
    columns = index[step * np.arange(count)[:, None] + dilation * np.arange(len(taps))]
    rows = np.repeat(np.arange(count), len(taps))
    return sparse.coo_matrix((np.tile(taps[::-1], count), (rows, columns.ravel())), shape=(count, tokens)).tocsr()


def responses(tokens: int, wavelet: str, levels: int, mode: str, transform: str) -> list[sparse.csr_matrix]:
    """What detail coefficients make of a unit impulse at every token, `[coefficients, tokens]`, finest level first."""
    low, high = _filters(wavelet)
    approximation, found = sparse.identity(tokens, format="csr"), []
    for level in range(levels):
        size, strides = approximation.shape[0], _strides(transform, level)
        found.append(_filter_matrix(size, high, mode, *strides) @ approximation)
        approximation = _filter_matrix(size, low, mode, *strides) @ approximation
    return found


@lru_cache(maxsize=16)
def back_projection(
    tokens: int, wavelet: str, levels: int, mode: str, weights: tuple[float, ...], transform: str = "decimated"
) -> tuple[np.ndarray, np.ndarray]:
    """How the energy of detail coefficients is handed back to tokens.

    With `psi[c, t]` the response of detail coefficient c to a unit impulse at token t and `w[c]` the weight of its
    level, token t receives `sum_c w[c] psi[c, t]^2 energy[c] / sqrt(sum_c w[c] psi[c, t]^4)`. An impulse at t0 has
    `energy[c] = psi[c, t0]^2`; by the Cauchy-Schwarz inequality its own position then receives the most of all, at
    every position, edges included, whatever the transform. No filter delay has to be guessed: it is in `psi`.

    Returns
    -------
    index : [tokens * k]
        Coefficients, in the order finest to coarsest level, that reach a token, token after token.
    gain : [tokens, k]
        Their gains; what fills short rows has gain 0.
    """
    found = responses(tokens, wavelet, levels, mode, transform)
    blocks = [np.sqrt(weight) * one.power(2) for one, weight in zip(found, weights, strict=False)]
    response = sparse.vstack(blocks).tocsc()  # sqrt(w) psi^2
    length = np.sqrt(np.asarray(response.power(2).sum(axis=0)).ravel())
    root_weight = np.concatenate([np.full(b.shape[0], np.sqrt(w)) for b, w in zip(blocks, weights, strict=False)])
    counts = np.diff(response.indptr)
    index = np.zeros((tokens, counts.max()), dtype=np.int64)
    gain = np.zeros((tokens, counts.max()), dtype=np.float32)
    filled = np.arange(counts.max()) < counts[:, None]
    index[filled] = response.indices
    gain[filled] = response.data * root_weight[response.indices] / np.repeat(length, counts)
    return index.ravel(), gain


def coefficients(tokens: int, wavelet: str, levels: int, mode: str, transform: str) -> list[int]:
    """Number of coefficients of every level, finest first."""
    (low, _), counts = _filters(wavelet), []
    for level in range(levels):
        tokens = _extension(tokens, low, mode, *_strides(transform, level))[1]
        counts.append(tokens)
    return counts


@dataclass(frozen=True)
class Repeating:
    """A back-projection whose middle repeats itself: the tables of all tokens would take more room than their keys.

    Parameters
    ----------
    index, gain : [rows, k]
        As of `back_projection`, of the first tokens, of one period, and of the last tokens.
    step : int [rows, k]
        By how much an index grows from one period to the next.
    first, period, repeats : int
        The period begins at token `first`, has so many tokens, and comes so many times.
    """

    index: np.ndarray
    gain: np.ndarray
    step: np.ndarray
    first: int
    period: int
    repeats: int


@lru_cache(maxsize=16)
def repeating(
    tokens: int, wavelet: str, levels: int, mode: str, weights: tuple[float, ...], transform: str = "decimated"
) -> Repeating:
    """The back-projection of `tokens` tokens, from that of a shorter sequence with the same ends."""
    period = 2**levels  # after so many tokens the grids of all levels are where they were
    edge = 2 * period * len(_filters(wavelet)[0])  # more tokens than an end can reach
    short = 2 * edge + period + tokens % period
    if tokens <= short:
        index, gain = back_projection(tokens, wavelet, levels, mode, weights, transform)
        return Repeating(index.reshape(gain.shape), gain, np.zeros_like(index), tokens, 0, 0)
    more = (tokens - short) // period  # periods that the short sequence lacks
    index, gain = back_projection(short, wavelet, levels, mode, weights, transform)
    index = index.reshape(gain.shape)
    of_period = [period // _strides(transform, 0)[0] ** (level + 1) for level in range(levels)]
    counts = coefficients(short, wavelet, levels, mode, transform)
    starts = np.concatenate([[0], np.cumsum(counts)])
    level = np.searchsorted(starts, index, side="right") - 1
    place = index - starts[level]
    step = np.asarray(of_period)[level]
    row = np.arange(short)[:, None]
    ahead = place * (period // step) - row  # tokens from the row to its coefficient
    # added periods lie before the last tokens, and before what the first see of the other end of a periodic sequence
    late = np.where(row < edge, ahead > short // 2, (row >= edge + period) & (ahead > -short // 2))
    longer = np.concatenate([[0], np.cumsum(np.asarray(counts) + more * np.asarray(of_period))])
    return Repeating(longer[level] + place + late * more * step, gain, step, edge, period, more + 1)


def to_tokens(
    energies: list[Array],
    tokens: int,
    wavelet: str,
    mode: str,
    weights: tuple[float, ...],
    transform: str = "decimated",
) -> Array:
    """Energy of detail coefficients, as `[heads, tokens]`.

    The coefficients are `[heads, coefficients]`, one array a level from finest to coarsest.
    """
    xp = namespace(energies[0])
    table = repeating(tokens, wavelet, len(energies), mode, weights, transform)
    energy = xp.concat(energies, axis=-1)
    heads, reach = energy.shape[0], table.gain.shape[1]
    index, gain, step = (constant(part, energy) for part in (table.index, table.gain, table.step))

    def weighted(index: Array, gain: Array) -> Array:
        """`[heads, ...]` of index `[..., rows, k]` and gain `[rows, k]`."""
        return xp.reshape(weighted_sums(energy, index, gain), (heads, -1))

    inner = slice(table.first, table.first + table.period)
    found = [weighted(index[: table.first], gain[: table.first])]
    for some in blocks(table.repeats, table.repeats * table.period * reach * (16 + 8 * heads), energy):
        if some.stop > some.start:
            number = like(np.arange(some.start, some.stop), energy)[:, None, None]
            found.append(weighted(index[inner] + number * step[inner], gain[inner]))
    found.append(weighted(index[inner.stop :], gain[inner.stop :]))
    return xp.concat(found, axis=-1)
