"""SnapKV: keep what the last prompt tokens look at (Li et al., arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, like, namespace


def neighbours(x: Array, kernel: int) -> Array:
    """Mean of `[heads, tokens]` over `kernel` neighbouring tokens, an odd number; zeros beyond the ends."""
    xp = namespace(x)
    heads, tokens = x.shape
    edge = like(np.zeros((heads, kernel // 2), dtype=np.float32), x)
    padded = xp.concat([edge, x, edge], axis=-1)
    return sum(padded[:, i : i + tokens] for i in range(kernel)) / kernel


@dataclass(frozen=True)
class SnapKV:
    """Mean attention weight from the last `window` queries, averaged over neighbouring tokens.

    The tokens of the window itself score 1, more than any average of weights.

    Parameters
    ----------
    window : int
        How many of the last prompt tokens vote.
    kernel : int
        Width of the average over neighbouring tokens, odd.
    """

    window: int = 64
    kernel: int = 5

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")

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
        votes = attention_received(queries, layer.keys, layer.scaling)[:, :before] / queries.shape[1]
        pooled = neighbours(votes, self.kernel)
        return xp.concat([pooled, xp.ones_like(layer.key_norms[:, before:])], axis=-1)
