"""Oracle of attention mass: the tokens that the true continuation will look at. An upper bound, not a method."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array


@dataclass(frozen=True)
class OracleMass:
    """True mean attention weight from the tokens to come: no choice of so many tokens recovers more of it.

    Parameters
    ----------
    horizon : int
        Continuation tokens whose queries are looked at; fewer where the continuation is shorter.
    """

    horizon: int = 64

    reads: ClassVar[tuple[str, ...]] = ("keys", "future")

    def __post_init__(self):
        if self.horizon < 1:
            raise ValueError(f"horizon={self.horizon} must be at least 1")

    def score(self, layer: LayerView) -> Array:
        return attention_received(layer.future, layer.keys, layer.scaling, causal=False) / layer.future.shape[1]
