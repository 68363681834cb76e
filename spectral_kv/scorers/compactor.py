"""Compactor: tokens that others can't stand in for, and that attention within a stretch looks at (arXiv 2507.08143)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView, norms
from spectral_kv.scorers.snapkv import neighbours
from spectral_kv.xp import Array, constant, float32, like, namespace, to_numpy


@lru_cache(maxsize=4)
def sketch(dim: int, rank: int, seed: int) -> np.ndarray:
    """Normal numbers of variance 1 / rank, `[dim, rank]`."""
    return (np.random.default_rng(seed).normal(size=(dim, rank)) / rank**0.5).astype(np.float32)


def leverage(x: Array, jitter: float) -> Array:
    """Diagonal `x_i' (X'X + jitter)^-1 x_i` of the hat matrix of `[heads, tokens, dim]`, `[heads, tokens]`.

    `jitter` is in units of the mean diagonal of X'X.
    """
    xp = namespace(x)
    gram = to_numpy(xp.matmul(xp.permute_dims(x, (0, 2, 1)), x)).astype(np.float64)
    size = gram.shape[-1]
    ridge = jitter * np.trace(gram, axis1=-2, axis2=-1)[:, None, None] / size + np.finfo(np.float32).tiny
    inverse = np.linalg.inv(gram + ridge * np.eye(size)).astype(np.float32)
    return xp.sum(xp.matmul(x, like(inverse, x)) * x, axis=-1)


@dataclass(frozen=True)
class Compactor:
    """`blend` times the leverage of the key before RoPE, plus the attention that the token gets; both standardised.

    Leverage is that of centred keys in a random subspace. Attention is not causal, among the tokens of a stretch alone,
    summed over its queries, times the norm of the value, averaged over neighbouring tokens. Logits have the model's
    scaling, which the first implementation leaves out.

    Parameters
    ----------
    blend : float
        Weight of the leverage.
    rank : int
        Dimension of the subspace; keys of no more dimensions are taken as they are.
    chunk : int
        Tokens of a stretch.
    kernel : int
        Width of the average over neighbouring tokens, odd.
    jitter : float
        Added to the covariance of the keys, in units of its mean diagonal.
    seed : int
        Of the subspace.
    """

    blend: float = 0.35
    rank: int = 48
    chunk: int = 256
    kernel: int = 3
    jitter: float = 1e-6
    seed: int = 0

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "queries")
    window: ClassVar[None] = None  # all queries

    def __post_init__(self):
        if self.rank < 1 or self.chunk < 1:
            raise ValueError(f"rank={self.rank} and chunk={self.chunk} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be an odd number, 1 for no averaging")
        if self.jitter < 0:
            raise ValueError(f"jitter={self.jitter} can't be negative")

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        keys = layer.unrotated
        keys = keys - xp.mean(keys, axis=1, keepdims=True)
        if self.rank < keys.shape[-1]:
            keys = xp.matmul(keys, constant(sketch(keys.shape[-1], self.rank, self.seed), keys))
        attention = neighbours(self._attention(layer) * norms(layer.values), self.kernel)
        return self.blend * standardised(leverage(keys, self.jitter), layer) + standardised(attention, layer)

    def _attention(self, layer: LayerView) -> Array:
        """Weight from the observed queries of a token's own stretch, `[kv_heads, tokens]`."""
        queries = layer.last_queries()
        first = layer.tokens - queries.shape[1]  # of earlier tokens, after an eviction, no queries are left
        found = []
        for start in range(0, layer.tokens, self.chunk):
            stop = min(start + self.chunk, layer.tokens)
            keys, own = layer.keys[:, start:stop], slice(max(start - first, 0), max(stop - first, 0))
            if own.start == own.stop:
                found.append(namespace(keys).zeros_like(float32(keys[..., 0])))
            else:
                found.append(attention_received(queries[:, own], keys, layer.scaling, causal=False))
        return namespace(layer.keys).concat(found, axis=-1)


def standardised(x: Array, layer: LayerView) -> Array:
    """Scores `[heads, tokens]` less their mean over the evictable tokens, over their standard deviation."""
    xp = namespace(x)
    middle = x[:, layer.evictable]
    mean = xp.mean(middle, axis=-1, keepdims=True)
    return (x - mean) / xp.clip(xp.sqrt(xp.mean((middle - mean) ** 2, axis=-1, keepdims=True)), 1e-12, None)
