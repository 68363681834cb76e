"""What the spectral scorers share: the signal they look at and the blend they end in."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView, recency, unit
from spectral_kv.xp import Array, float32

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
    """

    spectral_weight: float = 0.6
    recency_weight: float = 0.2
    norm_weight: float = 0.2
    signal: str = "unrotated_keys"
    sign: str = "deviation"

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def __post_init__(self):
        if self.signal not in SIGNALS:
            raise ValueError(f"method.signal={self.signal} is not known: choose one of {', '.join(SIGNALS)}")
        if self.sign not in SIGNS:
            raise ValueError(f"method.sign={self.sign} is not known: choose one of {', '.join(SIGNS)}")

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
        deviation = self.spectral(float32(signals[self.signal]()))
        if self.sign == "smoothness":
            deviation = -deviation
        return (
            self.spectral_weight * unit(deviation, layer.evictable)
            + self.recency_weight * recency(layer)
            + self.norm_weight * unit(layer.key_norms, layer.evictable)
        )
