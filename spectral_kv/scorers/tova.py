"""TOVA: keep what the last token looks at (Oren et al., arXiv 2401.06104)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, namespace


@dataclass(frozen=True)
class Tova:
    """Attention weight from the last query, averaged over all heads of the layer: every head keeps the same tokens."""

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")
    window: ClassVar[int] = 1

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        weights = attention_received(layer.last_queries(self.window), layer.keys, layer.scaling)
        mean = xp.mean(weights, axis=0, keepdims=True)
        return xp.broadcast_to(mean, (layer.keys.shape[0], layer.tokens))
