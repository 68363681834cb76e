"""What the spectral scorers share: the signal they look at and the blend they end in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView, recency, unit
from spectral_kv.xp import Array, float32, like, namespace

SIGNALS = ("unrotated_keys", "rotated_keys", "values")
SIGNS = ("deviation", "smoothness")


@dataclass(frozen=True)
class Spectral(ABC):
    """Base of the spectral scorers.

    `spectral_weight * unit(spectral) + recency_weight * recency + norm_weight * unit(key norm)`.

    Parameters
    ----------
    spectral_weight, recency_weight, norm_weight : float
        Weights of the three terms, each scaled to [0, 1] within the head over the evictable tokens.
    signal : str
        What is transformed along tokens: keys before RoPE, keys as cached, or values.
    sign : str
        Keep what deviates from the smooth signal, or what follows it.
    shuffle_seed : int, optional
        A control: tokens are transformed in a random order, drawn from this, the document and the layer, the same for
        all heads, and each gets the deviation it has there. By default they are transformed as they come.
    """

    spectral_weight: float = 0.6
    recency_weight: float = 0.2
    norm_weight: float = 0.2
    signal: str = "unrotated_keys"
    sign: str = "deviation"
    shuffle_seed: int | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def __post_init__(self):
        if self.signal not in SIGNALS:
            raise ValueError(f"signal={self.signal} is not known: choose one of {', '.join(SIGNALS)}")
        if self.sign not in SIGNS:
            raise ValueError(f"sign={self.sign} is not known: choose one of {', '.join(SIGNS)}")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ValueError(f"shuffle_seed={self.shuffle_seed} can't be negative: write 0 or more, or leave it unset")

    @abstractmethod
    def spectral(self, x: Array) -> Array:
        """Deviation of every token of the signal `[kv_heads, tokens, dim]`, as `[kv_heads, tokens]`."""
        ...

    def score(self, layer: LayerView) -> Array:
        signals = {
            "unrotated_keys": lambda: layer.unrotated,
            "rotated_keys": lambda: layer.keys,
            "values": lambda: layer.values,
        }
        x = float32(signals[self.signal]())
        deviation = self.spectral(x) if self.shuffle_seed is None else self._shuffled(x, layer.seed)
        return self.blend(deviation, layer.key_norms, layer)

    def blend(self, deviation: Array, norms: Array, layer: LayerView) -> Array:
        """The weighted terms, from deviations and key norms `[heads, tokens]`."""
        if self.sign == "smoothness":
            deviation = -deviation
        return (
            self.spectral_weight * unit(deviation, layer.evictable)
            + self.recency_weight * recency(layer)
            + self.norm_weight * unit(norms, layer.evictable)
        )

    def _shuffled(self, x: Array, seed: tuple[int, ...]) -> Array:
        """Deviation of every token where it lies after shuffling, brought back to its own place."""
        xp = namespace(x)
        order = np.random.default_rng([self.shuffle_seed, *seed]).permutation(x.shape[-2])
        deviation = self.spectral(xp.take(x, like(order, x), axis=-2))
        return xp.take(deviation, like(np.argsort(order), x), axis=-1)
