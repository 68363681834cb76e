"""KeyDiff: keep the keys that point away from the others (Park et al., arXiv 2504.15364)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, float32, namespace


@dataclass(frozen=True)
class KeyDiff:
    """Minus the cosine between the key, as cached, and the mean of the normalised keys."""

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        directions = float32(layer.keys) / xp.clip(layer.key_norms, 1e-12, None)[..., None]
        anchor = xp.mean(directions, axis=1, keepdims=True)
        anchor = anchor / xp.clip(xp.sqrt(xp.sum(anchor**2, axis=-1, keepdims=True)), 1e-12, None)
        return -xp.sum(directions * anchor, axis=-1)
