"""H2O: keep the heavy hitters, the tokens that all queries so far looked at most (Zhang et al., arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.attention import attention_logits
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, namespace

CHUNK = 128  # queries at a time: weights of all take tokens^2 numbers a head, those of few fit into a CPU's cache


@dataclass(frozen=True)
class H2O:
    """Attention weight summed over the queries of the prompt, each seeing what came before it.

    Parameters
    ----------
    window : int, optional
        Sum over the last so many queries only; by default over all.
    """

    window: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or unset for all queries")

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        kv_heads, tokens, _ = layer.keys.shape
        count = layer.queries.shape[1]
        total = xp.zeros_like(layer.key_norms)
        for start in range(0, count, CHUNK):
            queries = layer.queries[:, start : start + CHUNK]
            seen = tokens - count + start + queries.shape[1]
            logits = attention_logits(queries, layer.keys[:, :seen], layer.scaling, causal=True)
            # the weights summed over queries as one product: dividing all of them first would be most of the work
            exponentials = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
            shares = xp.reshape(1.0 / xp.sum(exponentials, axis=-1), (kv_heads, 1, -1))
            mass = xp.matmul(shares, xp.reshape(exponentials, (kv_heads, -1, seen)))[:, 0]
            total = total + xp.concat([mass, xp.zeros_like(layer.key_norms[:, seen:])], axis=-1)
        return total / (layer.queries.shape[0] // kv_heads)
