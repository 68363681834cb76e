"""TriAttentionKV: what calibrated queries will, on average over future distances, think of a key.

Source: TriAttention, arXiv 2604.04921, equations 6-13, in the form where the mean over offsets is taken once for
all keys.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, float32, like, namespace


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
        The series is averaged over the distances 1, 2, 4, ... up to this one, in tokens.
    """

    largest_offset: int = 65536

    def __post_init__(self):
        if self.largest_offset < 1:
            raise ValueError(f"method.largest_offset={self.largest_offset} must be at least 1")

    reads: ClassVar[tuple[str, ...]] = ("keys", "calibration")

    def expectation(self, layer: LayerView) -> Array:
        """Mean expected logit over the future distances (up to a common factor).

        `[kv_heads, tokens, query heads a KV head]`.
        """
        if layer.statistics is None:
            raise ValueError("TriAttention needs calibrated query statistics")
        xp = namespace(layer.keys)
        keys = float32(layer.keys)
        kv_heads, _, dim = keys.shape
        mu, modulus = layer.statistics.layer(layer.layer)  # [query_heads, dim / 2]
        now = int(layer.positions[-1]) + 1
        phases = layer.rope.angles(now + offsets(self.largest_offset))  # float64: the phases reach 1e5 radians
        weight = mu * np.mean(np.exp(1j * phases), axis=0)
        coefficients = np.concatenate([weight.real, weight.imag, modulus - np.abs(mu)], axis=-1).astype(np.float32)
        coefficients = coefficients.reshape(kv_heads, -1, 3 * dim // 2).transpose(0, 2, 1)
        real, imaginary = keys[..., : dim // 2], keys[..., dim // 2 :]
        features = xp.concat([real, imaginary, xp.sqrt(real**2 + imaginary**2)], axis=-1)
        return xp.matmul(features, like(np.ascontiguousarray(coefficients), keys))

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        logits = self.expectation(layer)
        middle = logits[:, layer.evictable]
        mean = xp.mean(middle, axis=1, keepdims=True)
        deviation = xp.sqrt(xp.mean((middle - mean) ** 2, axis=1, keepdims=True))
        return xp.max((logits - mean) / xp.clip(deviation, 1e-6, None), axis=-1)
