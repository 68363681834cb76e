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
    to come. Sinks, which would take most of the softmax, are left out of it and score highest.

    Parameters
    ----------
    horizon : int
        How many positions to come the rotation is averaged over.
    sinks : int
        First tokens: their queries are left out of the statistics and their keys out of the softmax.
    epsilon : float
        Added to the weights before the value norm is multiplied in.
    window : int, optional
        Statistics of the last so many queries only; by default of all.
    """

    horizon: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    window: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "queries")

    def __post_init__(self):
        if self.horizon < 1 or self.sinks < 0 or self.epsilon < 0:
            raise ValueError(
                f"horizon={self.horizon} must be at least 1, sinks={self.sinks} and epsilon={self.epsilon} not negative"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or unset for all queries")

    def gather(self, layer: LayerView) -> tuple[Array, Array, Array]:
        """Number, mean and scatter of the un-rotated queries: `[]`, `[query_heads, 1, dim]`, `[query_heads, dim, dim]`.

        Those of `layer.queries` and all gathered before.
        """
        xp = namespace(layer.keys)
        queries = layer.last_queries(self.window)
        positions = np.atleast_2d(layer.positions)[0, layer.tokens - queries.shape[1] :]  # equal in all heads
        left_out = int(np.sum(positions < self.sinks))
        queries, positions = queries[:, left_out:], positions[left_out:]
        if not len(positions) and layer.gathered is not None:
            return layer.gathered
        queries = layer.rope.unrotate(float32(queries), positions)
        count = like(np.float32(len(positions)), queries)
        mean = xp.sum(queries, axis=1, keepdims=True) / max(len(positions), 1)
        centred = queries - mean
        scatter = xp.matmul(xp.permute_dims(centred, (0, 2, 1)), centred)
        if layer.gathered is None:
            return count, mean, scatter
        before, old_mean, old_scatter = layer.gathered  # two sets as one: Chan, Golub and LeVeque, 1979
        step, total = mean - old_mean, before + count
        between = xp.matmul(xp.permute_dims(step, (0, 2, 1)), step) * (before * count / total)
        return total, old_mean + step * (count / total), old_scatter + scatter + between

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        done = layer.queries is None and layer.gathered is not None
        count, mean, scatter = layer.gathered if done else self.gather(layer)
        if not float(count):
            raise ValueError(f"sinks={self.sinks} leaves no query of {layer.tokens} tokens: lower it")
        first = int(np.sum(np.atleast_2d(layer.positions)[:, : self.sinks].max(axis=0) < self.sinks))
        keys = float32(layer.keys)[:, first:]
        kv_heads, _, dim = keys.shape
        turn = like(self._mean_rotation(layer), keys)
        group = scatter.shape[0] // kv_heads
        mean = xp.reshape(xp.matmul(mean, turn), (kv_heads, group, 1, dim))
        covariance = xp.matmul(xp.matmul(turn.T, scatter / count), turn)
        covariance = xp.reshape(covariance, (kv_heads, group, dim, dim))
        per_query_head = keys[:, None]
        linear = xp.sum(per_query_head * mean, axis=-1) * layer.scaling
        quadratic = xp.sum(xp.matmul(per_query_head, covariance) * per_query_head, axis=-1) * layer.scaling**2 / 2
        weights = xp.mean(softmax(linear + quadratic), axis=1) + self.epsilon
        scores = weights * xp.sqrt(xp.sum(float32(layer.values)[:, first:] ** 2, axis=-1))
        highest = xp.broadcast_to(xp.max(scores) + 1, (kv_heads, first))
        return xp.concat([highest, scores], axis=-1)

    def _mean_rotation(self, layer: LayerView) -> np.ndarray:
        """`[dim, dim]`, by which un-rotated row vectors are multiplied."""
        now = int(layer.positions.max()) + 1
        turns = np.exp(1j * layer.rope.angles(now + np.arange(self.horizon))).mean(axis=0)
        turns = turns * layer.rope.attention_scaling
        cos, sin = np.diag(turns.real), np.diag(turns.imag)
        return np.block([[cos, sin], [-sin, cos]]).astype(np.float32)
