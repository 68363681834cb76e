"""H2O: keep the heavy hitters, the tokens that all queries so far looked at most (Zhang et al., arXiv 2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.attention import attention_received
from spectral_kv.scorers.base import LayerView
from spectral_kv.xp import Array, namespace


@dataclass(frozen=True)
class H2O:
    """Attention weight summed over the queries of the prompt, each seeing what came before it.

    When a cache that has grown is brought back to its budget, over the queries since the last time.

    Parameters
    ----------
    window : int, optional
        Sum over the last so many queries only; by default over all.
    recent_share : float, optional
        Share of the budget, after the sinks, that goes to the most recent tokens whatever their weight: half, as in the
        paper. None leaves it to the budget.
    """

    window: int | None = None
    recent_share: float | None = 0.5

    reads: ClassVar[tuple[str, ...]] = ("keys", "queries")

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or unset for all queries")
        if self.recent_share is not None and not 0 <= self.recent_share < 1:
            raise ValueError(f"recent_share={self.recent_share} must lie in [0, 1), or be unset for the budget's own")

    def gather(self, layer: LayerView) -> Array:
        """Weights `[kv_heads, tokens]` summed over `layer.queries` and those gathered before."""
        mass = attention_received(layer.last_queries(self.window), layer.keys, layer.scaling)
        if layer.gathered is None:
            return mass
        xp = namespace(mass)
        before = layer.gathered.shape[-1]
        return xp.concat([mass[:, :before] + layer.gathered, mass[:, before:]], axis=-1)

    def score(self, layer: LayerView) -> Array:
        return layer.gathered if layer.queries is None and layer.gathered is not None else self.gather(layer)
