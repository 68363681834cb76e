"""KVzip+: KVzip by what a token adds to the residual stream (kvpress, NVIDIA, arXiv 2601.07891)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from spectral_kv.scorers.base import Repetition, projected_norms
from spectral_kv.scorers.kvzip import KVzip
from spectral_kv.xp import Array


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """KVzip's weight times the norm of the value after W_O, over the norm of the layer's input at the token that votes.

    kvpress takes the norm of that input after its RMSNorm, which hardly differs between tokens.
    """

    reads: ClassVar[tuple[str, ...]] = ("keys", "values", "projection", "repetition")

    def _weights(self, seen: Repetition) -> Callable[[slice], Array | float]:
        return lambda some: 1.0 / seen.inputs[some][None, :, None]

    def _of_head(self, seen: Repetition, head: int, largest: Array) -> Array:
        kv_head = head // (len(seen.queries) // len(seen.keys))
        values, weights = seen.values[kv_head : kv_head + 1, seen.span], seen.projection[head : head + 1]
        return largest * projected_norms(values, weights, 2)
