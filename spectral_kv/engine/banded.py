"""Spectral deviations of all layers in one pass over the keys, where the transform is a band of short filters.

Un-rotation, all levels of the transform as one banded matrix product a tile of tokens, energies and key norms are one
kernel; a second one brings energies back to tokens. The matrices are measured: they are what the scorer's own
transform makes of impulses. Where a transform is not a band (a box in frequency rings for ever), there is no plan.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.transforms.fourier import highpass
from spectral_kv.transforms.wavelet import back_projection, coefficients

TILE = 128  # tokens, and filters of a program
STEP = 32  # tokens of a matrix product: what windows are multiples of
SHORTEST = 8 * TILE  # tokens of which a plan is made
RING = 4096  # tokens on which the response of a low-pass filter is measured
LOST = 1e-4  # of the norm of a filter's response that may lie outside its window


@dataclass(frozen=True)
class Plan:
    """What the programs of one pass do; `blocks` of them a head, with `TILE` filters each.

    Parameters
    ----------
    matrices : float32 [kinds, TILE, window]
    kind, start : int [blocks]
        The matrix of a block, and the first token that it sees; tokens beyond an end are reflected.
    energy : int [blocks, TILE]
        Where the energy of a filter goes; -1 for rows that are no filter.
    energies : int
    index, gain : [tokens, k], optional
        Which energies a token gets, and how much of them; by default a token gets its own.
    """

    matrices: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    energy: np.ndarray
    energies: int
    index: np.ndarray | None = None
    gain: np.ndarray | None = None


def plan(scorer: Spectral, tokens: int) -> Plan | None:
    """How a scorer's deviations of `tokens` tokens are computed in one pass, or None if they can't be."""
    if tokens < SHORTEST or scorer.signal != "unrotated_keys" or scorer.shuffle_seed is not None:
        return None
    if type(scorer) is Fourier:
        return fir(scorer.cutoff, scorer.taper, tokens)
    if type(scorer) in (Wavelet, WaveletTri) and not scorer.centred:
        return wavelet_plan(scorer, tokens)
    return None


@lru_cache(maxsize=32)
def fir(cutoff: float, taper: float, tokens: int) -> Plan | None:
    """The high-pass filter of FourierKV as a filter of `2 * TILE + 1` taps, or None where it has more."""
    if tokens < 2 * TILE:  # reflected once at each end
        return None
    impulse = np.zeros((1, RING, 1))
    impulse[0, RING // 2] = 1
    response = highpass(impulse, cutoff, taper)[0, :, 0]
    taps = response[RING // 2 - TILE : RING // 2 + TILE + 1]
    if np.sum(response**2) - np.sum(taps**2) > (LOST**2) * np.sum(response**2):
        return None
    matrix = np.zeros((TILE, 3 * TILE), dtype=np.float32)
    for row in range(TILE):
        matrix[row, row : row + 2 * TILE + 1] = taps[::-1]
    blocks = -(-tokens // TILE)
    energy = np.arange(blocks * TILE).reshape(blocks, TILE)
    return Plan(
        matrix[None], np.zeros(blocks, dtype=int), np.arange(blocks) * TILE - TILE,
        np.where(energy < tokens, energy, -1), tokens,
    )  # fmt: skip


def _impulses(scorer: Wavelet, tokens: int) -> list[np.ndarray]:
    """Responses `[coefficients, tokens]` of the details, finest level first."""
    return [d[0] for d in scorer.details(np.eye(tokens)[None])]


def levels_of(scorer: Wavelet, tokens: int) -> list[int]:
    """Number of detail coefficients of every level, finest first."""
    return coefficients(tokens, scorer.wavelet, scorer.levels, scorer.mode, scorer.transform)


@lru_cache(maxsize=8)
def wavelet_plan(scorer: Wavelet, tokens: int) -> Plan | None:
    """All levels of a wavelet transform, one after another, or None where its filters are no band.

    Coefficients of the first and last tokens have filters of their own, all others those of their place in a tile.

    Both are measured on a shorter sequence that ends in the same place of a tile.
    """
    if tokens < SHORTEST:
        return None
    short = SHORTEST + tokens % TILE
    responses = _impulses(scorer, short)
    each = [len(b) - len(a) for a, b in zip(_impulses(scorer, short - TILE), responses, strict=True)]  # a tile
    if any(n < 1 or n > TILE for n in each):
        return None
    tiles = short // TILE

    def of_tile(tile: int) -> list[tuple[int, int]]:
        return [(level, tile * n + i) for level, n in enumerate(each) for i in range(n)]

    def matrix(coefficients: list[tuple[int, int]], start: int, width: int) -> np.ndarray | None:
        """Filters over tokens from `start`, if they see no others."""
        rows = np.stack([responses[level][i] for level, i in coefficients])
        inside = np.zeros((len(rows), width))
        low, high = max(start, 0), min(start + width, short)
        inside[:, low - start : high - start] = rows[:, low:high]
        return None if rows[:, :low].any() or rows[:, high:].any() else inside

    middle = tiles // 2
    seen = np.flatnonzero(np.any([responses[level][i] != 0 for level, i in of_tile(middle)], axis=0))
    before = -(-max(middle * TILE - seen[0], 0) // STEP) * STEP
    window = -(-(before + seen[-1] + 1 - middle * TILE) // STEP) * STEP
    inner = matrix(of_tile(middle), middle * TILE - before, window)
    usual = [
        tile for tile in range(tiles)
        if (m := matrix(of_tile(tile), tile * TILE - before, window)) is not None and np.allclose(m, inner, atol=1e-13)
    ]  # fmt: skip
    first, last = usual[0], usual[-1]
    if usual != list(range(first, last + 1)):
        return None
    head = [c for tile in range(first) for c in of_tile(tile)]
    tail = [(level, i) for level, n in enumerate(each) for i in range((last + 1) * n, len(responses[level]))]
    longer = (tokens - short) // TILE  # tiles that the short sequence lacks
    counts = [len(r) + longer * n for r, n in zip(responses, each, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrices, kinds, starts, energies = [], [], [], []

    def add(coefficients: list[tuple[int, int]], start: int, repeats: int, shift: int) -> bool:
        """Blocks with one matrix each for pieces of `coefficients`, repeated tile after tile."""
        for piece in range(0, len(coefficients), TILE):
            some = coefficients[piece : piece + TILE]
            found = matrix(some, start, window)
            if found is None:
                return False
            matrices.append(np.concatenate([found, np.zeros((TILE - len(some), window))]))
            for repeat in range(repeats):
                kinds.append(len(matrices) - 1)
                starts.append(start + (repeat + shift) * TILE)
                where = [offsets[level] + i + (repeat + shift) * each[level] for level, i in some]
                energies.append(where + [-1] * (TILE - len(some)))
        return True

    def edge(coefficients: list[tuple[int, int]], shift: int) -> bool:
        """Coefficients of an end, those together that one window can see."""
        spans = {c: np.flatnonzero(responses[c[0]][c[1]]) for c in coefficients}
        spans = {
            c: span if len(span) else np.array([short - 1]) for c, span in spans.items()
        }  # haar's last may be zero
        left = sorted(coefficients, key=lambda c: (spans[c][0], spans[c][-1]))
        while left:
            start = int(spans[left[0]][0])
            together = [c for c in left if spans[c][-1] < start + window][:TILE]
            if not together or not add(together, start, 1, shift):
                return False
            left = [c for c in left if c not in set(together)]
        return True

    inner_tile = of_tile(first)
    if not edge(head, 0) or not add(inner_tile, first * TILE - before, last - first + 1 + longer, 0):
        return None
    if not edge(tail, longer):
        return None
    index, gain = back_projection(
        tokens, scorer.wavelet, scorer.levels, scorer.mode, scorer.weights, scorer.transform
    )  # fmt: skip
    return Plan(
        np.stack(matrices).astype(np.float32), np.array(kinds), np.array(starts), np.array(energies), int(offsets[-1]),
        index.reshape(tokens, -1), gain,
    )  # fmt: skip


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
