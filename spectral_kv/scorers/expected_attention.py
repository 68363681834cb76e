"""Expected Attention: the weight that a Gaussian model of future queries gives (Devoto et al., arXiv 2510.00636)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView, norms
from spectral_kv.xp import Array, blocks, float32, like, namespace, over_tokens, softmax

Gathered = tuple[Array, Array, Array]  # number, mean and scatter of queries


def _with(gathered: Gathered | None, queries: Array) -> Gathered:
    """What was gathered, and un-rotated queries `[query_heads, some, dim]`: two sets as one (Chan et al., 1979)."""
    xp, some = namespace(queries), queries.shape[1]
    count = like(np.float32(some), queries)
    mean = xp.sum(queries, axis=1, keepdims=True) / max(some, 1)
    centred = queries - mean
    scatter = xp.matmul(xp.permute_dims(centred, (0, 2, 1)), centred)
    if gathered is None:
        return count, mean, scatter
    before, old_mean, old_scatter = gathered
    step, total = mean - old_mean, before + count
    between = xp.matmul(xp.permute_dims(step, (0, 2, 1)), step) * (before * count / total)
    return total, old_mean + step * (count / total), old_scatter + scatter + between


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
    with_bias : bool
        Whether the mean query has the bias of W_Q, where there is one. False is the first implementation, which leaves
        it out: the same tokens where a model has no such bias.
    """

    horizon: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    window: int | None = None
    with_bias: bool = True

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "queries")

    def __post_init__(self):
        if self.horizon < 1 or self.sinks < 0 or self.epsilon < 0:
            raise ValueError(
                f"horizon={self.horizon} must be at least 1, sinks={self.sinks} and epsilon={self.epsilon} not negative"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or unset for all queries")

    def gather(self, layer: LayerView) -> Gathered:
        """Number, mean and scatter of the un-rotated queries: `[]`, `[query_heads, 1, dim]`, `[query_heads, dim, dim]`.

        Those of `layer.queries` and all gathered before.
        """
        queries, gathered = layer.last_queries(self.window), layer.gathered
        positions = np.atleast_2d(layer.positions)[0, layer.tokens - queries.shape[1] :]  # equal in all heads
        left_out = int(np.sum(positions < self.sinks))
        if left_out == len(positions) and gathered is not None:
            return gathered
        for part in blocks(len(positions) - left_out, 5 * 4 * math.prod(queries.shape), layer.keys):
            some = slice(left_out + part.start, left_out + part.stop)
            plain = layer.rope.unrotate(float32(queries[:, some]), positions, tokens=some)
            gathered = _with(gathered, plain)
        return gathered

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        done = layer.queries is None and layer.gathered is not None
        count, mean, scatter = layer.gathered if done else self.gather(layer)
        if not float(count):
            raise ValueError(f"sinks={self.sinks} leaves no query of {layer.tokens} tokens: lower it")
        first = int(np.sum(np.atleast_2d(layer.positions)[:, : self.sinks].max(axis=0) < self.sinks))
        kv_heads, _, dim = layer.keys.shape
        if not self.with_bias and layer.query_bias is not None:
            mean = mean - float32(layer.query_bias)[:, None]
        turn = like(self.mean_rotation(layer), mean)
        group = scatter.shape[0] // kv_heads
        mean = xp.permute_dims(xp.reshape(xp.matmul(mean, turn), (kv_heads, group, dim)), (0, 2, 1))
        covariance = xp.matmul(xp.matmul(turn.T, scatter / count), turn)
        covariance = xp.reshape(covariance, (kv_heads, group, dim, dim))

        def logits(keys: Array) -> Array:
            """`[kv_heads, tokens, group]`."""
            keys = float32(keys)
            quadratic = xp.sum(xp.matmul(keys[:, None], covariance) * keys[:, None], axis=-1) * layer.scaling**2 / 2
            return xp.matmul(keys, mean) * layer.scaling + xp.permute_dims(quadratic, (0, 2, 1))

        expected = xp.permute_dims(over_tokens(logits, layer.keys[:, first:], 2 * group + 1), (0, 2, 1))
        weights = xp.mean(softmax(expected), axis=1) + self.epsilon
        scores = weights * norms(layer.values[:, first:])
        highest = xp.broadcast_to(xp.max(scores) + 1, (kv_heads, first))
        return xp.concat([highest, scores], axis=-1)

    def mean_rotation(self, layer: LayerView) -> np.ndarray:
        """`[dim, dim]`, by which un-rotated row vectors are multiplied."""
        now = int(layer.positions.max()) + 1
        turns = np.exp(1j * layer.rope.angles(now + np.arange(self.horizon))).mean(axis=0)
        turns = turns * layer.rope.attention_scaling
        cos, sin = np.diag(turns.real), np.diag(turns.imag)
        return np.block([[cos, sin], [-sin, cos]]).astype(np.float32)
