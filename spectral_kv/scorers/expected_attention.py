"""Expected Attention: the weight that a Gaussian model of future queries gives (Devoto et al., arXiv 2510.00636)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, float32, like, namespace, softmax


@dataclass(frozen=True)
class ExpectedAttention:
    """Softmax of the expected logit `E[exp(q k)]`, averaged over the query heads of a KV head, times the value norm.

    Mean and covariance are those of the prompt's own un-rotated queries, turned by the mean rotation of the positions
    to come.

    Parameters
    ----------
    future : int
        How many positions to come the rotation is averaged over.
    sinks : int
        First queries that are left out of the statistics.
    epsilon : float
        Added to the weights before the value norm is multiplied in.
    window : int, optional
        Statistics of the last so many queries only; by default of all.
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 1e-4
    window: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "queries")

    def __post_init__(self):
        if self.future < 1 or self.sinks < 0 or self.epsilon < 0:
            raise ValueError(
                f"future={self.future} must be at least 1, sinks={self.sinks} and epsilon={self.epsilon} not negative"
            )

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        keys = float32(layer.keys)
        kv_heads, tokens, dim = keys.shape
        count = layer.queries.shape[1]
        positions = np.atleast_2d(layer.positions)[0, -count:]  # the latest tokens are the same in all heads
        queries = layer.rope.unrotate(float32(layer.queries), positions)
        if count == tokens:
            queries = queries[:, self.sinks :]
        mean = xp.mean(queries, axis=1, keepdims=True)
        centred = queries - mean
        covariance = xp.matmul(xp.permute_dims(centred, (0, 2, 1)), centred) / centred.shape[1]
        turn = like(self._mean_rotation(layer), keys)
        group = covariance.shape[0] // kv_heads
        mean = xp.reshape(xp.matmul(mean, turn), (kv_heads, group, 1, dim))
        covariance = xp.matmul(xp.matmul(turn.T, covariance), turn)
        covariance = xp.reshape(covariance, (kv_heads, group, dim, dim))
        per_query_head = keys[:, None]
        linear = xp.sum(per_query_head * mean, axis=-1) * layer.scaling
        quadratic = xp.sum(xp.matmul(per_query_head, covariance) * per_query_head, axis=-1) * layer.scaling**2 / 2
        weights = xp.mean(softmax(linear + quadratic), axis=1)
        return (weights + self.epsilon) * xp.sqrt(xp.sum(float32(layer.values) ** 2, axis=-1))

    def _mean_rotation(self, layer: LayerView) -> np.ndarray:
        """`[dim, dim]`, by which un-rotated row vectors are multiplied."""
        now = int(layer.positions.max()) + 1
        turns = np.exp(1j * layer.rope.angles(now + np.arange(self.future))).mean(axis=0)
        turns = turns * layer.rope.attention_scaling
        cos, sin = np.diag(turns.real), np.diag(turns.imag)
        return np.block([[cos, sin], [-sin, cos]]).astype(np.float32)
