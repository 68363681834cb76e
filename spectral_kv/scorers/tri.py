"""TriAttentionKV: what calibrated queries will, on average over future distances, think of a key.

Source: TriAttention, arXiv 2604.04921, equations 6-13.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, blocks, float32, like, namespace, over_tokens

AGGREGATIONS = ("mean", "max")
PATHS = ("collapsed", "unrotated")


def offsets(largest: int) -> np.ndarray:
    """Future distances 1, 2, 4, ... up to `largest`."""
    return 2.0 ** np.arange(int(np.log2(largest)) + 1)


@dataclass(frozen=True)
class TriAttention:
    """Trigonometric series of RoPE on calibrated query means, plus a norm term for the spread of the queries.

    Every query head scores the keys of its KV head; scores are standardised over the evictable tokens, and the KV
    head takes the maximum over its group.

    Parameters
    ----------
    largest_offset : int
        The series is taken at the distances 1, 2, 4, ... up to this one, in tokens.
    aggregation : str
        `mean` or `max` over the distances.
    path : str
        `collapsed` works on rotated keys and takes the mean over distances once for all keys; `unrotated` evaluates
        equations 6-10 as printed, for every key and distance. Same scores, 17 times the work.
    disable_trig : bool
        Leave the trigonometric series out.
    disable_mlr : bool
        Weigh the norm term by the mean modulus of the queries, not by the part of it that is spread.
    """

    largest_offset: int = 65536
    aggregation: str = "mean"
    path: str = "collapsed"
    disable_trig: bool = False
    disable_mlr: bool = False

    reads: ClassVar[tuple[str, ...]] = ("keys", "calibration")

    def __post_init__(self):
        if self.largest_offset < 1:
            raise ValueError(f"largest_offset={self.largest_offset} must be at least 1")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={self.aggregation} is not known: choose {' or '.join(AGGREGATIONS)}")
        if self.path not in PATHS:
            raise ValueError(f"path={self.path} is not known: choose {' or '.join(PATHS)}")

    def expectation(self, layer: LayerView) -> Array:
        """Expected logit of every key, `[kv_heads, tokens, query heads a KV head]`.

        Before the factor of the model's logits and the queries' own share of the attention scaling, which do not change
        a ranking.
        """
        if layer.statistics is None:
            raise ValueError("TriAttention needs calibrated query statistics")
        mu, modulus = layer.statistics.of(layer.index)  # [query_heads, dim / 2]
        norm = modulus if self.disable_mlr else modulus - np.abs(mu)
        if self.disable_trig:
            mu = np.zeros_like(mu)
        future = int(layer.positions.max()) + 1 + offsets(self.largest_offset)
        if self.path == "unrotated":
            found = [partial(self._at, layer, position, mu, norm) for position in future]
        else:
            turns = np.exp(1j * layer.rope.angles(future))  # [offsets, bands] in float64: phases reach 1e5 radians
            if self.aggregation == "mean":
                turns = turns.mean(axis=0, keepdims=True)
            found = [partial(self._logits, layer.keys, mu * turn, norm) for turn in turns]
        xp = namespace(layer.keys)
        if self.aggregation == "max":
            return reduce(xp.maximum, (logits() for logits in found))
        return sum(logits() for logits in found) / len(found)

    def _logits(self, keys: Array, weight: np.ndarray, norm: np.ndarray) -> Array:
        """`Re(sum_f weight_f conj(k_f)) + sum_f norm_f |k_f|` as one product, `[kv_heads, tokens, group]`."""
        xp = namespace(keys)
        kv_heads, _, dim = keys.shape
        coefficients = np.concatenate([weight.real, weight.imag, norm], axis=-1).astype(np.float32)
        coefficients = coefficients.reshape(kv_heads, -1, 3 * dim // 2).transpose(0, 2, 1)
        coefficients = like(np.ascontiguousarray(coefficients), keys)

        def products(some: Array) -> Array:
            some = float32(some)
            moduli = xp.sqrt(some[..., : dim // 2] ** 2 + some[..., dim // 2 :] ** 2)
            return xp.matmul(xp.concat([some, moduli], axis=-1), coefficients)

        return over_tokens(products, keys)

    def _at(self, layer: LayerView, position: float, mu: np.ndarray, norm: np.ndarray) -> Array:
        """Logits of a query at `position`, `[kv_heads, tokens, group]`."""
        found = []
        for some in blocks(layer.tokens, 32 * math.prod(layer.keys.shape), layer.keys):
            found.append(self._logits(self._turned(layer, position, some), mu, norm))
        return namespace(layer.keys).concat(found, axis=1)

    def _turned(self, layer: LayerView, position: float, some: slice) -> Array:
        """Some keys `[kv_heads, tokens, dim]` turned back by their distance to a query at `position`."""
        xp = namespace(layer.keys)
        keys = layer.rope.unrotate(float32(layer.keys[:, some]), layer.positions, tokens=some)
        keys = keys * layer.rope.attention_scaling
        distance = layer.rope.angles(position - np.atleast_2d(layer.positions)[:, some])  # [1 or kv_heads, some, bands]
        cos, sin = (like(f(distance).astype(np.float32), keys) for f in (np.cos, np.sin))
        half = keys.shape[-1] // 2
        real, imaginary = keys[..., :half], keys[..., half:]
        return xp.concat([real * cos + imaginary * sin, imaginary * cos - real * sin], axis=-1)

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        logits = self.expectation(layer)
        middle = logits[:, layer.evictable]
        mean = xp.mean(middle, axis=1, keepdims=True)
        deviation = xp.sqrt(xp.mean((middle - mean) ** 2, axis=1, keepdims=True))
        return xp.max((logits - mean) / xp.clip(deviation, 1e-6, None), axis=-1)
