"""What the spectral scorers share: the signal they look at and the blend they end in."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView, recency, unit
from spectral_kv.xp import Array, blocks, float32, like, namespace

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
    def energies(self, x: Array) -> list[Array]:
        """What a signal `[kv_heads, tokens, dim]` has, summed over channels: arrays `[kv_heads, ...]`.

        Channels can then come a few at a time, and no transform of all of them is ever there.
        """
        ...

    @abstractmethod
    def deviation(self, energies: list[Array], tokens: int) -> Array:
        """What the energies of all channels make of every token, `[kv_heads, tokens]`."""
        ...

    def copies(self, x: Array) -> int:
        """How many signals in single precision `energies` of arrays like `x` about takes the room of."""
        return 8

    def spectral(self, x: Array) -> Array:
        """Deviation of every token of the signal `[kv_heads, tokens, dim]`, as `[kv_heads, tokens]`."""
        return self.deviation(self.energies(x), x.shape[-2])

    def score(self, layer: LayerView) -> Array:
        xp, order = namespace(layer.keys), None
        if self.shuffle_seed is not None:
            order = np.random.default_rng([self.shuffle_seed, *layer.seed]).permutation(layer.tokens)
        deviation = self.deviation(self._energies(layer, order), layer.tokens)
        if order is not None:  # every token gets the deviation that it has where it lies after shuffling
            deviation = xp.take(deviation, like(np.argsort(order), deviation), axis=-1)
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

    def _energies(self, layer: LayerView, order: np.ndarray | None) -> list[Array]:
        """Energies of the signal, its tokens in `order` if one is given: of some heads and bands after others."""
        x = layer.values if self.signal == "values" else layer.keys
        size, found = 4 * self.copies(x) * math.prod(x.shape), []
        for heads in blocks(len(x), size, x):
            total: list[Array] = []
            for bands in blocks(-(-x.shape[-1] // 2), size * len(x[heads]) // len(x), x):
                part = self.energies(self._part(x, layer, heads, bands, order))
                total = [a + b for a, b in zip(total, part, strict=True)] if total else part
            found.append(total)
        return [namespace(x).concat(alike, axis=0) for alike in zip(*found, strict=True)]

    def _part(self, x: Array, layer: LayerView, heads: slice, bands: slice, order: np.ndarray | None) -> Array:
        """Some heads and bands `[heads, tokens, 2 * bands]` of the signal, which is in `x`."""
        xp, half = namespace(x), -(-x.shape[-1] // 2)
        x = x[heads]
        if bands != slice(0, half):
            x = xp.concat([x[..., bands], x[..., half + bands.start : half + bands.stop]], axis=-1)
        x = float32(x)
        if self.signal == "unrotated_keys":
            positions = layer.positions if np.ndim(layer.positions) == 1 else layer.positions[heads]
            x = layer.rope.unrotate(x, positions, bands=bands)
        return x if order is None else xp.take(x, like(order, x), axis=-2)
