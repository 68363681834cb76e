"""Spectral deviations of all layers in one pass over the keys, where the transform is a band of short filters.

Un-rotation, all levels of the transform as one banded matrix product a tile of tokens, energies and key norms are one
kernel; a second one brings energies back to tokens. The matrices are measured: they are what the scorer's own
transform makes of impulses. Where a transform is not a band (a box in frequency rings for ever), there is no plan.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.transforms.fourier import highpass
from spectral_kv.transforms.wavelet import back_projection, coefficients, responses

TILE = 128  # tokens, and filters of a program
STEP = 32  # tokens of a matrix product: what windows are multiples of
REACH = 128  # tokens that a low-pass filter sees on either side
SHORTEST = 1024  # tokens of which a plan is made
RING = 4096  # tokens on which the response of a low-pass filter is measured
LOST = 1e-4  # of the norm of a filter's response that may lie outside its window
SMOOTH_TILE = 64  # tokens whose smooth part few numbers hold
RANKS = (16, 32)  # how many, for sums of mirrored tokens and for their differences
LEFT_OUT = 1e-5  # of the norm of tokens that fewer numbers may lose


@dataclass(frozen=True)
class Smooth:
    """The smooth part of a tile of tokens by few numbers, each a sum over the tokens around the tile.

    A filter that is its own mirror image makes of mirrored tokens mirrored results: sums of tokens at equal distance
    from the middle, and their differences, are filtered apart, each by half a matrix.

    Parameters
    ----------
    down : float32 [2, rank, window / 2]
        From sums, and from differences, of the window's tokens, the outermost first, to the numbers.
    up : float32 [2, tile / 2, rank]
        From these to the smooth part of the tile's first half: even part and odd part. The second half is their
        difference, the last token first.
    """

    down: np.ndarray
    up: np.ndarray


@dataclass(frozen=True)
class Plan:
    """What the programs of one pass do; `blocks` of them a head, with a tile's filters each.

    Parameters
    ----------
    matrices : float32 [kinds, tile, window]
    kind, start : int [blocks]
        The matrix of a block, and the first token that it sees; tokens beyond an end are reflected.
    energy : int [blocks, tile]
        Where the energy of a filter goes; -1 for rows that are no filter.
    energies : int
    index, gain : [tokens, k], optional
        Which energies a token gets, and how much of them; by default a token gets its own.
    smooth : Smooth, optional
        What is left of a token by the filters is the token less this.
    """

    matrices: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    energy: np.ndarray
    energies: int
    index: np.ndarray | None = None
    gain: np.ndarray | None = None
    smooth: Smooth | None = None


def plan(scorer: Spectral, tokens: int) -> Plan | None:
    """How a scorer's deviations of `tokens` tokens are computed in one pass, or None if they can't be."""
    if not _banded(scorer, tokens):
        return None
    return fir(scorer.cutoff, scorer.taper, tokens) if type(scorer) is Fourier else wavelet_plan(scorer, tokens)


def bands(scorer: Spectral, tokens: int, tile: int) -> Plan | None:
    """`plan` in blocks of other than `TILE` tokens, for energies alone: without the way back to tokens."""
    if not _banded(scorer, tokens):
        return None
    if type(scorer) is Fourier:
        return fir(scorer.cutoff, scorer.taper, tokens, tile)
    return wavelet_bands(scorer, tokens, tile)


def _banded(scorer: Spectral, tokens: int) -> bool:
    """Whether the scorer's transform may be a band, and the sequence is long enough for a plan."""
    if tokens < SHORTEST or scorer.signal != "unrotated_keys" or scorer.shuffle_seed is not None:
        return False
    return type(scorer) is Fourier or (type(scorer) in (Wavelet, WaveletTri) and not scorer.centred)


@lru_cache(maxsize=8)
def _taps(cutoff: float, taper: float) -> np.ndarray | None:
    """The high-pass filter of FourierKV in `2 * REACH + 1` taps, or None where it has more."""
    impulse = np.zeros((1, RING, 1))
    impulse[0, RING // 2] = 1
    response = highpass(impulse, cutoff, taper)[0, :, 0]
    taps = response[RING // 2 - REACH : RING // 2 + REACH + 1]
    return None if np.sum(response**2) - np.sum(taps**2) > (LOST**2) * np.sum(response**2) else taps


def _band(taps: np.ndarray, tile: int) -> np.ndarray:
    """Filters `[tile, tile + 2 * REACH]` of a tile's tokens."""
    matrix = np.zeros((tile, tile + 2 * REACH))
    for row in range(tile):
        matrix[row, row : row + 2 * REACH + 1] = taps[::-1]
    return matrix


@lru_cache(maxsize=32)
def fir(cutoff: float, taper: float, tokens: int, tile: int = TILE) -> Plan | None:
    """The high-pass filter of FourierKV as a filter of `2 * REACH + 1` taps, or None where it has more."""
    taps = _taps(cutoff, taper)
    if tokens < 2 * REACH or taps is None:  # reflected once at each end
        return None
    blocks = -(-tokens // tile)
    energy = np.arange(blocks * tile).reshape(blocks, tile)
    return Plan(
        _band(taps, tile).astype(np.float32)[None], np.zeros(blocks, dtype=int), np.arange(blocks) * tile - REACH,
        np.where(energy < tokens, energy, -1), tokens, smooth=smooth(cutoff, taper),
    )  # fmt: skip


@lru_cache(maxsize=8)
def smooth(cutoff: float, taper: float, tile: int = SMOOTH_TILE) -> Smooth | None:
    """What a filter of `fir` takes away from tokens, or None where a tile of it takes too many numbers."""
    taps = _taps(cutoff, taper)
    if taps is None:
        return None
    one = np.zeros_like(taps)
    one[REACH] = 1
    outer, inner = np.split(_band(one - taps, tile)[: tile // 2], 2, axis=1)
    parts = [np.linalg.svd(part / 2, full_matrices=False) for part in (outer + inner[:, ::-1], outer - inner[:, ::-1])]
    most = max(int(np.sum(values > LEFT_OUT)) for _, values, _ in parts)
    rank = next((r for r in RANKS if r >= most), None)
    if rank is None:
        return None
    down = np.stack([right[:rank] * np.sqrt(values[:rank, None]) for _, values, right in parts])
    up = np.stack([left[:, :rank] * np.sqrt(values[:rank]) for left, values, _ in parts])
    return Smooth(down.astype(np.float32), up.astype(np.float32))


def _impulses(scorer: Wavelet, tokens: int) -> list[np.ndarray]:
    """Responses `[coefficients, tokens]` of the details, finest level first."""
    found = responses(tokens, scorer.wavelet, scorer.levels, scorer.mode, scorer.transform)
    return [response.toarray() for response in found]


def levels_of(scorer: Wavelet, tokens: int) -> list[int]:
    """Number of detail coefficients of every level, finest first."""
    return coefficients(tokens, scorer.wavelet, scorer.levels, scorer.mode, scorer.transform)


@lru_cache(maxsize=8)
def wavelet_plan(scorer: Wavelet, tokens: int) -> Plan | None:
    """`wavelet_bands`, and how energies come back to tokens."""
    found = wavelet_bands(scorer, tokens)
    if found is None:
        return None
    index, gain = back_projection(
        tokens, scorer.wavelet, scorer.levels, scorer.mode, scorer.weights, scorer.transform
    )  # fmt: skip
    return replace(found, index=index.reshape(tokens, -1), gain=gain)


@lru_cache(maxsize=8)
def wavelet_bands(scorer: Wavelet, tokens: int, tile: int = TILE) -> Plan | None:
    """All levels of a wavelet transform, one after another, or None where its filters are no band.

    Coefficients of the first and last tokens have filters of their own, all others those of their place in a tile.

    Both are measured on a shorter sequence that ends in the same place of a tile.
    """
    period = 2**scorer.levels if scorer.transform == "decimated" else 1  # after which the grids of all levels meet
    if tokens < SHORTEST or tile % period:
        return None
    short = SHORTEST + tokens % tile
    impulses = _impulses(scorer, short)
    each = [len(b) - len(a) for a, b in zip(_impulses(scorer, short - tile), impulses, strict=True)]  # a tile
    if any(n < 1 or n > tile for n in each):
        return None
    tiles = short // tile

    def of_tile(place: int) -> list[tuple[int, int]]:
        return [(level, place * n + i) for level, n in enumerate(each) for i in range(n)]

    def matrix(coefficients: list[tuple[int, int]], start: int, width: int) -> np.ndarray | None:
        """Filters over tokens from `start`, if they see no others."""
        rows = np.stack([impulses[level][i] for level, i in coefficients])
        inside = np.zeros((len(rows), width))
        low, high = max(start, 0), min(start + width, short)
        inside[:, low - start : high - start] = rows[:, low:high]
        return None if rows[:, :low].any() or rows[:, high:].any() else inside

    middle = tiles // 2
    seen = np.flatnonzero(np.any([impulses[level][i] != 0 for level, i in of_tile(middle)], axis=0))
    before = -(-max(middle * tile - seen[0], 0) // STEP) * STEP
    window = -(-(before + seen[-1] + 1 - middle * tile) // STEP) * STEP
    inner = matrix(of_tile(middle), middle * tile - before, window)
    usual = [
        place for place in range(tiles)
        if (m := matrix(of_tile(place), place * tile - before, window)) is not None
        and np.allclose(m, inner, atol=1e-13)
    ]  # fmt: skip
    first, last = usual[0], usual[-1]
    if usual != list(range(first, last + 1)):
        return None
    head = [c for place in range(first) for c in of_tile(place)]
    tail = [(level, i) for level, n in enumerate(each) for i in range((last + 1) * n, len(impulses[level]))]
    longer = (tokens - short) // tile  # tiles that the short sequence lacks
    counts = [len(r) + longer * n for r, n in zip(impulses, each, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrices, kinds, starts, energies = [], [], [], []

    def add(coefficients: list[tuple[int, int]], start: int, repeats: int, shift: int) -> bool:
        """Blocks with one matrix each for pieces of `coefficients`, repeated tile after tile."""
        for piece in range(0, len(coefficients), tile):
            some = coefficients[piece : piece + tile]
            found = matrix(some, start, window)
            if found is None:
                return False
            matrices.append(np.concatenate([found, np.zeros((tile - len(some), window))]))
            for repeat in range(repeats):
                kinds.append(len(matrices) - 1)
                starts.append(start + (repeat + shift) * tile)
                where = [offsets[level] + i + (repeat + shift) * each[level] for level, i in some]
                energies.append(where + [-1] * (tile - len(some)))
        return True

    def edge(coefficients: list[tuple[int, int]], shift: int) -> bool:
        """Coefficients of an end, those together that one window can see."""
        spans = {c: np.flatnonzero(impulses[c[0]][c[1]]) for c in coefficients}
        spans = {
            c: span if len(span) else np.array([short - 1]) for c, span in spans.items()
        }  # haar's last may be zero
        left = sorted(coefficients, key=lambda c: (spans[c][0], spans[c][-1]))
        while left:
            start = int(spans[left[0]][0])
            together = [c for c in left if spans[c][-1] < start + window][:tile]
            if not together or not add(together, start, 1, shift):
                return False
            left = [c for c in left if c not in set(together)]
        return True

    inner_tile = of_tile(first)
    if not edge(head, 0) or not add(inner_tile, first * tile - before, last - first + 1 + longer, 0):
        return None
    if not edge(tail, longer):
        return None
    return Plan(
        np.stack(matrices).astype(np.float32), np.array(kinds), np.array(starts), np.array(energies), int(offsets[-1])
    )


def filtered(chosen: Plan, x: np.ndarray) -> np.ndarray:
    """Deviations `[heads, tokens]` of a signal `[heads, tokens, dim]` by a plan, as the kernels compute them."""
    tokens = x.shape[1]
    energy = np.zeros((len(x), chosen.energies))
    for kind, start, where in zip(chosen.kind, chosen.start, chosen.energy, strict=True):
        seen = np.abs(start + np.arange(chosen.matrices.shape[2]))
        seen = np.where(seen >= tokens, 2 * tokens - 2 - seen, seen)
        found = np.sum((chosen.matrices[kind].astype(np.float64) @ x[:, np.abs(seen)]) ** 2, axis=-1)
        energy[:, where[where >= 0]] = found[:, where >= 0]
    if chosen.index is None:
        return np.sqrt(energy)
    return np.sqrt(np.sum(energy[:, chosen.index] * chosen.gain, axis=-1))
