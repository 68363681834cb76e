"""WaveletTriAttn: where the key sequence changes, and what future queries will think of it."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView, unit
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.xp import Array


@dataclass(frozen=True)
class WaveletTri(Wavelet):
    """Weighted sum of the WaveletKV and the TriAttention score, each scaled to [0, 1] within the head.

    Parameters
    ----------
    tri_weight : float
        Share of the TriAttention score.
    largest_offset : int
        As in `TriAttention`.
    """

    tri_weight: float = 0.5
    largest_offset: int = 65536

    def __post_init__(self):
        super().__post_init__()
        TriAttention(self.largest_offset)
        if not 0 <= self.tri_weight <= 1:
            raise ValueError(f"tri_weight={self.tri_weight} must lie in [0, 1]")

    reads: ClassVar[tuple[str, ...]] = ("keys", "calibration")

    @property
    def tri(self) -> TriAttention:
        return TriAttention(self.largest_offset)

    def score(self, layer: LayerView) -> Array:
        return self.weighed(super().score(layer), self.tri.score(layer), layer.evictable)

    def weighed(self, wavelet: Array, tri: Array, evictable: slice) -> Array:
        """The weighted sum of two scores `[heads, tokens]`."""
        return (1.0 - self.tri_weight) * unit(wavelet, evictable) + self.tri_weight * unit(tri, evictable)
