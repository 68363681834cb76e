"""Streaming: sinks and a window of the most recent tokens (StreamingLLM, arXiv 2309.17453, positions kept)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView, recency
from spectral_kv.xp import Array, namespace


@dataclass(frozen=True)
class Streaming:
    """The later, the better."""

    reads: ClassVar[tuple[str, ...]] = ()

    def score(self, layer: LayerView) -> Array:
        xp = namespace(layer.keys)
        return xp.broadcast_to(recency(layer), (layer.keys.shape[0], layer.tokens))
