"""What a phase gets and what it returns."""

from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.stages.compress import Compressed, Compressor
from pipeline.stages.prefill import FullRun
from spectral_kv.backends.base import Backend

Row = dict[str, Any]  # metric, value, and the coordinates that apply: layer, head, turn


@dataclass(frozen=True)
class Context:
    """One document, prefilled and compressed. A phase that feeds tokens does so on `compressed.cache.copy()`."""

    backend: Backend
    full: FullRun
    compressed: Compressed
    compressor: Compressor
    document: int


class Phase(Protocol):
    """A group of metrics. `needs` is the number of tokens it wants after the prompt."""

    needs: int

    def measure(self, context: Context) -> list[Row]:
        """Tidy rows; those without layer and turn hold a value of the whole document."""
        ...
