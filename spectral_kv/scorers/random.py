"""Random: the control every scorer must beat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, like


@dataclass(frozen=True)
class Random:
    """Uniform scores, drawn anew for every document, layer and head.

    Parameters
    ----------
    seed : int
        With the document and the layer it determines the draw, on every backend alike.
    """

    seed: int = 0

    reads: ClassVar[tuple[str, ...]] = ()

    def score(self, layer: LayerView) -> Array:
        rng = np.random.default_rng([self.seed, *layer.seed])
        return like(rng.random((layer.keys.shape[0], layer.tokens), dtype=np.float32), layer.keys)
