"""DefensiveKV: keep what any single query of the window may miss most (Feng et al., arXiv 2510.13334)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.attention import attention_weights
from spectral_kv.scorers.base import LayerView, projected_norms
from spectral_kv.scorers.snapkv import neighbours
from spectral_kv.xp import Array, blocks, namespace


@dataclass(frozen=True)
class Defensive:
    """Largest weight from any of the last `window` queries and any head of the group, at least the mean of those.

    Weights of a query are averaged over neighbouring tokens and sum to the same afterwards. They are multiplied by the
    L1 norm of the value after W_O, as a share of that of all KV heads; where heads hold different tokens there is no
    such share, and the weight alone counts. The tokens of the window itself score highest. The authors' code fixes the
    tokens that hold most of the mean attention beforehand; that is left out.

    Parameters
    ----------
    window : int
        How many of the last prompt tokens vote.
    kernel : int
        Width of the average over neighbouring tokens, odd.
    """

    window: int = 32
    kernel: int = 5

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "queries", "projection")

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be an odd number, 1 for no averaging")

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        queries = layer.last_queries(self.window)
        before = layer.tokens - queries.shape[1]
        if before == 0:
            return xp.ones_like(layer.key_norms)
        most = self._largest(layer, queries, before)
        risk = xp.maximum(most, xp.mean(most, axis=-1, keepdims=True))
        if len(layer.keys) > 1:
            group = len(queries) // len(layer.keys)
            values = projected_norms(layer.values[:, :before], layer.projection, 1)
            share = xp.mean(xp.reshape(values, (len(layer.keys), group, before)), axis=1)
            risk = risk * share / xp.sum(share, axis=0, keepdims=True)
        highest = xp.broadcast_to(xp.max(risk) + 1, (len(layer.keys), layer.tokens - before))
        return xp.concat([risk, highest], axis=-1)

    def _largest(self, layer: LayerView, queries: Array, before: int) -> Array:
        """Largest averaged weight over the window and the group, `[kv_heads, before]`."""
        xp = namespace(queries)
        group, found = len(queries) // len(layer.keys), []
        for head in range(len(layer.keys)):
            own, most = queries[head * group : (head + 1) * group], None
            for some in blocks(group, 16 * group * own.shape[1] * layer.tokens, layer.keys):
                weights = attention_weights(own[some], layer.keys[head : head + 1], layer.scaling, causal=True)
                weights = xp.reshape(weights[..., :before], (-1, before))
                pooled = neighbours(weights, self.kernel)
                kept = xp.sum(weights, axis=-1, keepdims=True) / xp.sum(pooled, axis=-1, keepdims=True)
                largest = xp.max(pooled * kept, axis=0, keepdims=True)
                most = largest if most is None else xp.maximum(most, largest)
            found.append(most)
        return xp.concat(found, axis=0)
