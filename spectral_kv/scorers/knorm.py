"""Knorm: keep the keys of small norm (Devoto et al., arXiv 2406.11430)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array


@dataclass(frozen=True)
class Knorm:
    """Minus the norm of the key: in trained models keys of small norm draw much attention."""

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, layer: LayerView) -> Array:
        return -layer.key_norms
