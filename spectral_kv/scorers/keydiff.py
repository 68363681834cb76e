"""KeyDiff: keep the keys that point away from the others (Park et al., arXiv 2504.15364)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView, norms
from spectral_kv.xp import Array, float32, namespace, over_tokens


@dataclass(frozen=True)
class KeyDiff:
    """Minus the cosine between the key, as cached, and the mean of the normalised keys."""

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)

        def directions(keys: Array) -> Array:
            return float32(keys) / xp.clip(norms(keys), 1e-12, None)[..., None]

        sums = over_tokens(lambda keys: xp.sum(directions(keys), axis=1, keepdims=True), layer.keys)
        anchor = xp.sum(sums, axis=1, keepdims=True) / layer.tokens
        anchor = anchor / xp.clip(xp.sqrt(xp.sum(anchor**2, axis=-1, keepdims=True)), 1e-12, None)
        return over_tokens(lambda keys: -xp.sum(directions(keys) * anchor, axis=-1), layer.keys)
