"""Spectra: how the power of keys is spread over frequencies, in the full cache and in what is left of it."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.heads import runs
from spectral_kv.metrics.fidelity import interpolated
from spectral_kv.xp import float32, namespace, to_numpy


def band_edges(tokens: int, bands: int) -> np.ndarray:
    """Edges `[<= bands + 1]` of bands of rFFT bins 1, 2, ..., tokens // 2: equally wide on a logarithmic axis where
    that leaves a bin in each.
    """
    return np.unique(np.round(np.geomspace(1, tokens // 2 + 1, bands + 1)).astype(int))


def power(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean power a bin of `[heads, tokens, dim]` in every band, over heads and channels, `[bands]`.

    Scaled so that white noise of variance 1 has power 1 in every band. The mean over tokens is in no band.
    """
    spectrum = np.abs(np.fft.rfft(x, axis=1)) ** 2 / x.shape[1]
    bins = spectrum.mean(axis=(0, 2))
    return np.array([bins[start:stop].mean() for start, stop in pairwise(edges)])


@dataclass(frozen=True)
class Spectra:
    """Power spectra of keys before RoPE, along tokens, by layer; of the first `documents` documents.

    `frequency` is the middle of a band in cycles a token. `spectrum/full` is the full cache's, `spectrum/rebuilt` that
    of the compressed one with evicted tokens interpolated between their kept neighbours.
    """

    bands: int = 32
    documents: int = 4

    needs: ClassVar[int] = 0

    def __post_init__(self):
        if self.bands < 1 or self.documents < 1:
            raise ValueError(
                f"phase.spectra.bands={self.bands} and phase.spectra.documents={self.documents} must be at least 1"
            )

    def measure(self, context: Context) -> list[Row]:
        if context.document >= self.documents:
            return []
        prefill, rope = context.prefill, context.backend.rope
        held = context.contents()
        tokens = len(prefill.tokens)
        edges = band_edges(tokens, self.bands)
        middles = np.sqrt(edges[:-1] * (edges[1:] - 1)) / tokens
        rows: list[Row] = []
        for layer in range(len(held.positions)):
            keys = rope.unrotate(float32(prefill.keys[layer]), np.arange(tokens))
            ours = namespace(keys).concat(
                [
                    interpolated(rope.unrotate(float32(own), positions), positions, tokens)
                    for _, (own, positions) in runs(held.keys[layer], held.positions[layer])
                ]
            )
            for metric, x in (("spectrum/full", keys), ("spectrum/rebuilt", ours)):
                rows += [
                    {"layer": layer, "frequency": float(f), "metric": metric, "value": float(p)}
                    for f, p in zip(middles, power(to_numpy(x), edges), strict=True)
                ]
        return rows
