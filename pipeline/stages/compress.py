"""Stage 2: score, select and store; what it cost."""

import time
from dataclasses import dataclass

import numpy as np

from pipeline.stages.prefill import FullRun
from spectral_kv.backends.base import Backend, Cache, Contents, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.scorers.base import LayerView, Scorer
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.base import Storage
from spectral_kv.xp import Array, like


def observed(scorer: Scorer | None, tokens: int) -> int:
    """How many of the last queries of a prompt of `tokens` a scorer looks at."""
    if scorer is None or "queries" not in scorer.reads:
        return 0
    return tokens if scorer.window is None else min(scorer.window, tokens)


def foresees(scorer: Scorer | None) -> bool:
    """Whether a scorer is an oracle."""
    return scorer is not None and "future" in scorer.reads


@dataclass(frozen=True)
class Compressed:
    """A compressed cache, the kept tokens `[kv_heads, kept]` of every layer (None: all), and the seconds it took."""

    cache: Cache
    kept: list[Array] | None
    seconds: float


@dataclass(frozen=True)
class Compressor:
    """A method on a backend: which tokens are kept, and how they are held. Without a scorer every token is kept."""

    backend: Backend
    scorer: Scorer | None
    budget: Budget | None
    storage: Storage
    statistics: QueryStatistics | None

    def choose(
        self,
        cached: Prefill | Contents,
        document: int,
        queries: list[Array] | None = None,
        future: list[Array] | None = None,
    ) -> list[Array]:
        """The rows that the method keeps in every layer, `[kv_heads, kept]` each.

        `queries` (of the last tokens) and `future` (those to come) are `[query_heads, positions, dim]`, one a layer.
        """
        if self._keeps_all(cached):
            return self._all(cached)
        return self._selected(self._scores(cached, document, queries, future))

    def _keeps_all(self, cached: Prefill | Contents) -> bool:
        """Whether there is nothing to choose, and perhaps nothing that may be evicted."""
        return self.budget.tokens >= cached.keys[0].shape[-2]

    def _all(self, cached: Prefill | Contents) -> list[Array]:
        tokens = np.arange(cached.keys[0].shape[-2])
        return [like(np.tile(tokens, (self.backend.shape.kv_heads, 1)), keys) for keys in cached.keys]

    def _scores(
        self, cached: Prefill | Contents, document: int, queries: list[Array] | None, future: list[Array] | None
    ) -> list[Array]:
        """The scorer's verdict on every row, `[kv_heads, tokens]`, one a layer."""
        tokens = cached.keys[0].shape[-2]
        scores = []
        for layer, content in enumerate(zip(cached.keys, cached.values, cached.positions, strict=True)):
            keys, values, positions = content
            view = LayerView(
                keys, values, self.backend.rope, positions, self.budget.evictable(tokens), layer, (document, layer),
                self.backend.scaling, queries[layer] if queries else None, future[layer] if future else None,
                self.statistics,
            )  # fmt: skip
            scores.append(self.scorer.score(view))
        return scores

    def _selected(self, scores: list[Array]) -> list[Array]:
        kept = select_layers(scores, self.budget)
        expected = (self.backend.shape.kv_heads, self.budget.tokens)
        for layer, chosen in enumerate(kept):
            if tuple(chosen.shape) != expected:
                raise RuntimeError(f"layer {layer} kept {tuple(chosen.shape)} tokens, the budget says {expected}")
        return kept

    def compress(self, full: FullRun, document: int) -> Compressed:
        """Compress the prefill of a document.

        Scores do not depend on how many tokens are kept: a method at several budgets scores a document once, and
        the seconds that it took count at every budget.
        """
        scores, scoring = None, 0.0
        if self.scorer is not None and not self._keeps_all(full.prefill):
            calibration = self.statistics and self.statistics.digest
            method = f"{type(self.scorer).__module__}.{self.scorer}"  # dataclasses print all their parameters
            key = ("scores", method, self.budget.sinks, self.budget.recent, document, calibration)
            scores, scoring = full.once(key, lambda: self._timed_scores(full, document))
        self.backend.synchronize()
        start = time.perf_counter()
        kept = None if self.scorer is None else self._all(full.prefill) if scores is None else self._selected(scores)
        cache = self.backend.compress(full.prefill, kept, self.storage)
        self.backend.synchronize()
        return Compressed(cache, kept, scoring + time.perf_counter() - start)

    def _timed_scores(self, full: FullRun, document: int) -> tuple[list[Array], float]:
        """Scores of a prefill, and the seconds that they took."""
        queries = full.queries(observed(self.scorer, len(full.prefill.tokens)))
        future = full.extended(self.scorer.positions).queries if foresees(self.scorer) else None
        self.backend.synchronize()
        start = time.perf_counter()
        scores = self._scores(full.prefill, document, queries, future)
        self.backend.synchronize(scores)
        return scores, time.perf_counter() - start

    def recompress(self, cache: Cache, document: int, queries: list[Array], future: list[Array] | None = None) -> Cache:
        """Bring a cache that has grown back to the budget.

        `queries` are those of the tokens fed last; a method looks at as many of them as it wants.
        """
        if self.scorer is None:
            return cache
        wanted = observed(self.scorer, queries[0].shape[1])
        seen = [q[:, q.shape[1] - wanted :] for q in queries] if wanted else None
        kept = self.choose(self.backend.contents(cache), document, seen, future)
        return self.backend.recompress(cache, kept)
