"""What a phase gets and what it returns."""

from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.documents.base import Asked
from pipeline.stages.compress import Compressed, Compressor
from pipeline.stages.prefill import FullRun
from spectral_kv.backends.measuring import MeasuredBackend

Row = dict[str, Any]  # metric, value, and the coordinates that apply: layer, head, turn, depth


@dataclass(frozen=True)
class Context:
    """One document, prefilled and compressed. A phase that feeds tokens does so on `compressed.cache.copy()`."""

    backend: MeasuredBackend
    full: FullRun
    compressed: Compressed
    compressor: Compressor
    document: int
    lookups: list[Asked]


class Phase(Protocol):
    """A group of metrics. `needs` is the number of tokens it wants after the prompt.

    One with `asks = True` wants documents that carry lookups, one with `predicts = True` a model that predicts tokens,
    and one with `seeks = True` a model that plants tokens of its own.
    """

    needs: int

    def measure(self, context: Context) -> list[Row]:
        """Tidy rows; those without layer, turn and depth hold a value of the whole document."""
        ...
