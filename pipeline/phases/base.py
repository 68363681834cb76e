"""What a phase gets and what it returns."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from pipeline.documents.base import Asked
from pipeline.stages.compress import Compressed
from pipeline.stages.prefill import FullRun, answer
from spectral_kv.backends.base import Cache, Contents, Extension, Prefill
from spectral_kv.backends.measuring import MeasuredBackend
from spectral_kv.compressor import Compressor, foresees
from spectral_kv.heads import Heads, held
from spectral_kv.scorers.base import Scorer
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import Array

T = TypeVar("T")

Row = dict[str, Any]  # metric, value, and the coordinates that apply: layer, head, turn, depth


@dataclass(frozen=True)
class Context:
    """One document, prefilled and compressed: everything that a phase may ask for, by the names below.

    The stages' results `full`, `compressed` and `compressor` are for who makes a context, not for phases.
    """

    backend: MeasuredBackend
    full: FullRun
    compressed: Compressed
    compressor: Compressor
    document: int
    lookups: list[Asked]

    @property
    def prefill(self) -> Prefill:
        return self.full.prefill

    @property
    def continuation(self) -> np.ndarray:
        """The tokens `[continuation]` that follow the prompt."""
        return self.full.continuation

    @property
    def kept(self) -> list[Heads] | None:
        """Kept tokens `[kv_heads, kept]` of every layer, or a list of `[kept]`, one a KV head; None if all are."""
        return self.compressed.kept

    @property
    def mean_kept(self) -> float:
        """Kept tokens, the mean over layers and KV heads."""
        return sum(map(held, self.kept)) / (self.backend.shape.layers * self.backend.shape.kv_heads)

    @property
    def evictable(self) -> slice:
        """The prompt positions that are neither sinks nor recent window; all where the method keeps all."""
        tokens = len(self.prefill.tokens)
        return self.compressor.protected.evictable(tokens) if self.compressor.scorer else slice(0, tokens)

    @property
    def scores(self) -> list[Array] | None:
        """The scores `[kv_heads, tokens]` of every layer by which tokens were kept; None if none were needed."""
        return self.compressed.scores

    def scores_by(self, scorer: Scorer) -> list[Array]:
        """What another scorer, one that reads keys and values alone, says of the same prompt."""
        return replace(self.compressor, scorer=scorer).scores(self.prefill, self.document)

    def contents(self) -> Contents:
        """What the compressed cache holds."""
        return self.backend.contents(self.compressed.cache)

    def compressed_cache(self) -> Cache:
        """A compressed cache of its own for whoever feeds it tokens."""
        return self.compressed.cache.copy()

    def full_cache(self) -> Cache:
        """A cache of all tokens, as they are."""
        return self.backend.compress(self.prefill, None, Dense())

    def queries(self, count: int) -> list[Array]:
        """Queries `[query_heads, count, dim]` of the last prompt tokens, one a layer, as far as they are remembered."""
        return [q[:, max(q.shape[1] - count, 0) :] for q in self.prefill.queries]

    def recompressed(
        self, cache: Cache, queries: list[Array], future: list[Array], step: tuple[int, ...] = ()
    ) -> Cache:
        """A cache that has grown, brought back to the budget.

        `queries` are those of the tokens fed last; only an oracle looks at the `future`, those of the tokens to come.
        What is random differs between steps.
        """
        scorer = self.compressor.scorer
        ahead = [q[:, : scorer.horizon] for q in future] if foresees(scorer) else None
        return self.compressor.recompress(cache, self.document, queries, ahead, step)

    def once(self, key: Hashable, measured: Callable[[], T]) -> T:
        """What `measured` returns of the full cache, computed for the first method that asks for this document's.

        `key` names it and everything but the document that it depends on.
        """
        return self.full.once(key, measured)

    def extended(self, count: int) -> Extension:
        """Logits and queries of the first `count` continuation tokens on the full cache."""
        return self.full.extended(count)

    def extended_near(self, count: int, sinks: int, recent: int) -> Extension:
        """The same on a cache of the first `sinks` and the last `recent` prompt tokens alone."""
        return self.full.extended_near(count, sinks, recent)

    def answer(self, question: np.ndarray, count: int) -> list[int]:
        """The compressed cache's `count` tokens after a question `[tokens]` that is fed after the prompt."""
        return answer(self.backend, self.compressed_cache(), question, count)

    def full_answer(self, question: np.ndarray, count: int) -> list[int]:
        """The full cache's."""
        return self.full.answer(question, count)


class Phase(Protocol):
    """A group of metrics. `needs` is the number of tokens it wants after the prompt.

    One with `asks = True` wants documents that carry lookups, one with `predicts = True` a model that predicts tokens,
    and one with `seeks = True` a model that plants tokens of its own. One with `recompresses = True` brings caches that
    have grown back to their budget.
    """

    needs: int

    def measure(self, context: Context) -> list[Row]:
        """Tidy rows; those without layer, turn and depth hold a value of the whole document."""
        ...
