"""Oracle of attention output: true future attention mass times the norm of the value. An upper bound, not a method."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import LayerView, norms
from spectral_kv.scorers.oracle_mass import OracleMass
from spectral_kv.xp import Array


@dataclass(frozen=True)
class OracleValue(OracleMass):
    """What a token contributes to the output: its weight and the length of its value."""

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "future")

    def score(self, layer: LayerView) -> Array:
        return super().score(layer) * norms(layer.values)
