"""Observed attention: the mean weight that a token got from the queries that could see it.

As in kvpress (NVIDIA, arXiv 2510.00636), where it is the baseline of the methods that predict attention.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, like, namespace


@dataclass(frozen=True)
class ObservedAttention:
    """Attention weight summed over the queries of the prompt, over how many of them come after the token.

    The first token is seen by all, the last by one: a plain sum prefers what came early. When a cache that has grown is
    brought back to its budget, the queries are those since the last time.

    Parameters
    ----------
    window : int, optional
        Of the last so many queries only; by default of all.
    """

    window: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or unset for all queries")

    def gather(self, layer: LayerView) -> tuple[Array, Array]:
        """Weights and numbers of queries that saw a token, `[kv_heads, tokens]` and `[tokens]`, over all so far."""
        xp, queries = namespace(layer.keys), layer.last_queries(self.window)
        mass = attention_received(queries, layer.keys, layer.scaling)
        saw = np.minimum(queries.shape[1], np.arange(layer.tokens, 0, -1))
        saw = like(saw.astype(np.float32), mass)
        if layer.gathered is None:
            return mass, saw
        earlier, counts = layer.gathered
        before = counts.shape[-1]
        mass = xp.concat([mass[:, :before] + earlier, mass[:, before:]], axis=-1)
        return mass, xp.concat([saw[:before] + counts, saw[before:]])

    def score(self, layer: LayerView) -> Array:
        done = layer.queries is None and layer.gathered is not None
        mass, saw = layer.gathered if done else self.gather(layer)
        return mass / saw
