"""Query statistics for TriAttention (arXiv 2604.04921, equation 23 and section 3.1), kept as safetensors.

Per layer, query head and RoPE band f, over calibration text: the mean of the un-rotated query as a complex number,
`mu_f = E[q_f]`, and the mean of its modulus, `m_f = E[|q_f|]`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spectral_kv.xp import Array, float32, to_numpy

if TYPE_CHECKING:
    from spectral_kv.backends.base import Backend


@dataclass
class QueryStatistics:
    """Calibrated statistics of every query head.

    Parameters
    ----------
    mu : np.ndarray of complex, [layers, query_heads, dim / 2]
    modulus : np.ndarray, [layers, query_heads, dim / 2]
    metadata : dict of str
        What they were measured on: model hash, text, tokens.
    """

    mu: np.ndarray
    modulus: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers."""
        return hashlib.sha256(self.mu.tobytes() + self.modulus.tobytes()).hexdigest()

    def of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(mu, modulus)` of one layer, `[query_heads, dim / 2]` each."""
        return self.mu[index], self.modulus[index]

    def of_heads(self, heads: slice) -> "QueryStatistics":
        """Those of some query heads."""
        return QueryStatistics(self.mu[:, heads], self.modulus[:, heads], self.metadata)

    def joined(self, indices: list[int]) -> "QueryStatistics":
        """Layers as one with all their heads."""
        mu, modulus = (x[indices].reshape(1, -1, x.shape[-1]) for x in (self.mu, self.modulus))
        return QueryStatistics(mu, modulus, self.metadata)

    def save(self, path: str | Path) -> None:
        from safetensors.numpy import save_file

        tensors = {"mu_re": self.mu.real, "mu_im": self.mu.imag, "m": self.modulus}
        save_file({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()}, str(path), self.metadata)

    @classmethod
    def load(cls, path: str | Path, shape: tuple[int, int, int]) -> "QueryStatistics":
        """Read statistics for a model of `shape` = (layers, query_heads, dim / 2).

        Raises
        ------
        ValueError
            If the file holds something else, or the statistics of a model of another shape, or impossible ones.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                mu = file.get_tensor("mu_re") + 1j * file.get_tensor("mu_im")
                statistics = cls(mu, file.get_tensor("m"), file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold query statistics ({error})") from None
        return statistics.of_shape(shape, path)

    def of_shape(self, shape: tuple[int, int, int], path: str | Path) -> "QueryStatistics":
        """These statistics, unless they are of a model of another shape than (layers, query_heads, dim / 2).

        `path` is where they come from.

        Raises
        ------
        ValueError
            Or if they are impossible.
        """
        if self.mu.shape != shape or self.modulus.shape != shape:
            raise ValueError(
                f"{path} was calibrated for [layers, query heads, bands] = {list(self.mu.shape)}, "
                f"this model has {list(shape)}"
            )
        return self.possible(path)

    def possible(self, path: str | Path) -> "QueryStatistics":
        """These statistics, unless no queries have them: the mean modulus is at least the modulus of the mean.

        `path` is where they come from.

        Raises
        ------
        ValueError
        """
        possible = np.isfinite(self.modulus) & (np.abs(self.mu) <= 1.001 * self.modulus + 1e-6)
        if not possible.all():
            layer, head, band = np.argwhere(~possible)[0]
            raise ValueError(
                f"{path} has statistics that no queries have: in {(~possible).sum()} bands, first in band {band} of "
                f"layer {layer}, query head {head}, the mean modulus ({self.modulus[layer, head, band]:.4g}) is below "
                f"the modulus of the mean ({abs(self.mu[layer, head, band]):.4g}), or one is not a number"
            )
        return self


class Accumulator:
    """Running sums of un-rotated queries, so that any amount of text fits in memory."""

    def __init__(self, layers: int, query_heads: int, bands: int):
        self.sum = np.zeros((layers, query_heads, bands), dtype=np.complex128)
        self.modulus = np.zeros((layers, query_heads, bands))
        self.tokens = np.zeros(layers, dtype=np.int64)

    def add(self, layer: int, queries: np.ndarray) -> None:
        """Count the un-rotated queries `[query_heads, tokens, dim]` of one layer."""
        bands = queries.shape[-1] // 2
        z = queries[..., :bands].astype(np.float64) + 1j * queries[..., bands:].astype(np.float64)
        self.sum[layer] += z.sum(axis=1)
        self.modulus[layer] += np.abs(z).sum(axis=1)
        self.tokens[layer] += queries.shape[1]

    def statistics(self, **metadata: str) -> QueryStatistics:
        count = self.tokens[:, None, None]
        return QueryStatistics(
            self.sum / count,
            self.modulus / count,
            {k: str(v) for k, v in metadata.items()} | {"tokens": str(self.tokens[0])},
        )


def observe(backend: "Backend", windows: Iterable[np.ndarray], chunk: int | None = None) -> Accumulator:
    """Sums over the queries of every token of the windows `[tokens]`, rotated back.

    They are added up while a window runs, `chunk` tokens at a time (at once if None): nobody keeps them.
    """
    shape = backend.shape
    sums = Accumulator(shape.layers, shape.query_heads, shape.dim // 2)

    def watch(layer: int, queries: Array, keys: Array, values: Array) -> tuple[()]:
        seen, new = keys.shape[1], queries.shape[1]
        sums.add(layer, to_numpy(backend.rope.unrotate(float32(queries), np.arange(seen - new, seen))))
        return ()

    for window in windows:
        backend.prefill(window, 0, chunk, watch)
    return sums
