"""Discrete wavelet transform along tokens, and the way back from coefficients to token positions.

Filters are PyWavelets'; the transform itself is strided slices and sums, so that it runs where the keys live and
equals `pywt.wavedec`.
"""

from functools import lru_cache

import numpy as np
import pywt
from scipy import sparse

from spectral_kv.xp import Array, like, namespace

MODES = ("symmetric", "periodization")


@lru_cache(maxsize=64)
def _extension(tokens: int, taps: int, mode: str) -> tuple[np.ndarray, int]:
    """Source index of every sample the filter sees, and the number of coefficients.

    Coefficient o is `sum_j filter[j] * x[index[2 * o + taps - 1 - j]]`.
    """
    if mode == "periodization":
        even = tokens + tokens % 2  # an odd sequence repeats its last sample
        start = taps // 2 - taps + 1
        index = np.arange(start, start + even - 2 + taps) % even
        return np.minimum(index, tokens - 1), even // 2
    count = (tokens + taps - 1) // 2
    index = np.arange(2 - taps, 2 * count)
    folded = index % (2 * tokens)
    return np.where(folded < tokens, folded, 2 * tokens - 1 - folded), count


def dwt(x: Array, wavelet: str, mode: str) -> tuple[Array, Array]:
    """One level: approximation and detail coefficients `[..., coefficients, dim]` of `x` `[..., tokens, dim]`."""
    xp = namespace(x)
    bank = pywt.Wavelet(wavelet)
    taps = bank.dec_len
    index, count = _extension(x.shape[-2], taps, mode)
    extended = xp.take(x, like(index, x), axis=-2)
    samples = [extended[..., taps - 1 - j : taps - 1 - j + 2 * count - 1 : 2, :] for j in range(taps)]
    return tuple(sum(float(c) * s for c, s in zip(f, samples, strict=True)) for f in (bank.dec_lo, bank.dec_hi))


def wavedec(x: Array, wavelet: str, levels: int, mode: str = "symmetric") -> list[Array]:
    """`[approximation, detail of the coarsest level, ..., detail of the finest]`, the order of `pywt.wavedec`.

    Parameters
    ----------
    x : array, [..., tokens, dim]
    wavelet : str
        Any discrete wavelet of PyWavelets, e.g. `db4`.
    levels : int
        Each level halves the resolution.
    mode : str
        `symmetric` or `periodization`, how the sequence goes on beyond its ends.
    """
    if mode not in MODES:
        raise ValueError(f"wavelet mode {mode!r} is not known: choose one of {', '.join(MODES)}")
    details = []
    for _ in range(levels):
        x, detail = dwt(x, wavelet, mode)
        details.append(detail)
    return [x, *reversed(details)]


def _level_matrix(tokens: int, taps: np.ndarray, mode: str) -> sparse.csr_matrix:
    """One filter of one level as a matrix `[coefficients, tokens]`."""
    index, count = _extension(tokens, len(taps), mode)
    rows = np.repeat(np.arange(count), len(taps))
    columns = np.concatenate([index[2 * o : 2 * o + len(taps)] for o in range(count)])
    return sparse.coo_matrix((np.tile(taps[::-1], count), (rows, columns)), shape=(count, tokens)).tocsr()


@lru_cache(maxsize=16)
def back_projection(
    tokens: int, wavelet: str, levels: int, mode: str, weights: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """How the energy of detail coefficients is handed back to tokens.

    With `psi[c, t]` the response of detail coefficient c to a unit impulse at token t and `w[c]` the weight of its
    level, token t receives `sum_c w[c] psi[c, t]^2 energy[c] / sqrt(sum_c w[c] psi[c, t]^4)`. An impulse at t0 has
    `energy[c] = psi[c, t0]^2`; by the Cauchy-Schwarz inequality its own position then receives the most of all, at
    every position, edges included. No filter delay has to be guessed: it is in `psi`.

    Returns
    -------
    index, gain : [tokens, k]
        Coefficients (in the order finest to coarsest level) that reach a token, and their gains; short rows are
        filled with gain 0.
    """
    bank = pywt.Wavelet(wavelet)
    low, high = np.array(bank.dec_lo), np.array(bank.dec_hi)
    approximation = sparse.identity(tokens, format="csr")
    blocks = []
    for weight in weights[:levels]:
        size = approximation.shape[0]
        blocks.append(np.sqrt(weight) * (_level_matrix(size, high, mode) @ approximation).power(2))
        approximation = _level_matrix(size, low, mode) @ approximation
    response = sparse.vstack(blocks).tocsc()  # sqrt(w) psi^2
    length = np.sqrt(np.asarray(response.power(2).sum(axis=0)).ravel())
    root_weight = np.concatenate([np.full(b.shape[0], np.sqrt(w)) for b, w in zip(blocks, weights, strict=False)])
    counts = np.diff(response.indptr)
    index = np.zeros((tokens, counts.max()), dtype=np.int64)
    gain = np.zeros((tokens, counts.max()), dtype=np.float32)
    filled = np.arange(counts.max()) < counts[:, None]
    index[filled] = response.indices
    gain[filled] = response.data * root_weight[response.indices] / np.repeat(length, counts)
    return index, gain


def to_tokens(energies: list[Array], tokens: int, wavelet: str, mode: str, weights: tuple[float, ...]) -> Array:
    """Energy of detail coefficients, as `[heads, tokens]`.

    The coefficients are `[heads, coefficients]`, one array a level from finest to coarsest.
    """
    xp = namespace(energies[0])
    index, gain = back_projection(tokens, wavelet, len(energies), mode, weights)
    energy = xp.concat(energies, axis=-1)
    gathered = xp.reshape(xp.take(energy, like(index.ravel(), energy), axis=-1), (energy.shape[0], *index.shape))
    return xp.sum(gathered * like(gain, energy), axis=-1)
