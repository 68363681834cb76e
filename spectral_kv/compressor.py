"""A method on a model: what it observes, which tokens it keeps, and how they are held.

observe -> score -> select -> store -> extend, and again when the cache has grown
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from spectral_kv.backends.base import Backend, Cache, Contents, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.engine.together import scores as scores_of_layers
from spectral_kv.scorers.base import LayerView, Scorer
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.base import Storage
from spectral_kv.xp import Array, like

T = TypeVar("T")


def observed(scorer: Scorer | None, tokens: int) -> int:
    """How many of the last queries of a prompt of `tokens` a scorer looks at."""
    if scorer is None or "queries" not in scorer.reads:
        return 0
    return tokens if scorer.window is None else min(scorer.window, tokens)


def foresees(scorer: Scorer | None) -> bool:
    """Whether a scorer is an oracle."""
    return scorer is not None and "future" in scorer.reads


def gathers(scorer: Scorer | None) -> bool:
    """Whether a scorer can take what it wants of all queries while the prompt runs, so that nobody keeps them."""
    return hasattr(scorer, "gather") and scorer.window is None


@dataclass
class SharedScores:
    """What was computed of one document's scores, for whoever asks again with the same key; it lives as long as that.

    Scores do not depend on how many tokens are kept: a method at several budgets scores a document once.
    """

    found: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, computed: Callable[[], T]) -> T:
        """What `computed` returns, called for the first who asks."""
        if key not in self.found:
            self.found[key] = computed()
        return self.found[key]


@dataclass
class Gathering:
    """What a scorer gathers from the queries of one prompt: the `watch` of a prefill.

    `layers` holds it, one a layer, as the scorer's `gather` returns it.
    """

    compressor: "Compressor"
    layers: list[Any]

    def __call__(self, layer: int, queries: Array, keys: Array, values: Array) -> Any:
        view = self.compressor.view(
            layer, keys, values, np.arange(keys.shape[1]), slice(None), queries=queries, gathered=self.layers[layer]
        )
        self.layers[layer] = self.compressor.scorer.gather(view)
        return self.layers[layer]


@dataclass(frozen=True)
class Compressor:
    """Without a scorer every token is kept.

    Parameters
    ----------
    backend : Backend
    scorer : Scorer, optional
    budget : Budget, optional
        Needed with a scorer.
    storage : Storage
    statistics : QueryStatistics, optional
        Of the model, for scorers that read calibration.
    """

    backend: Backend
    scorer: Scorer | None
    budget: Budget | None
    storage: Storage
    statistics: QueryStatistics | None = None

    @property
    def protected(self) -> Budget | None:
        """The budget with the recent window that the scorer wants, where it states one."""
        share = getattr(self.scorer, "recent_share", None)
        return self.budget if share is None else self.budget.with_recent_share(share)

    def gathering(self) -> Gathering:
        """Of a prompt that is about to run, for a scorer that `gathers`."""
        return Gathering(self, [None] * self.backend.shape.layers)

    def view(
        self, index: int, keys: Array, values: Array, positions: np.ndarray, evictable: slice, **more
    ) -> LayerView:
        """What the scorer sees of a layer; `more` is what only some scorers read."""
        return LayerView(
            keys, values, self.backend.rope, positions, evictable,
            scaling=self.backend.scaling, index=index, statistics=self.statistics, **more,
        )  # fmt: skip

    def keeps_all(self, cached: Prefill | Contents) -> bool:
        """Whether there is nothing to choose, and perhaps nothing that may be evicted."""
        return self.scorer is None or self.budget.tokens >= cached.keys[0].shape[-2]

    def scores(
        self,
        cached: Prefill | Contents,
        document: int = 0,
        queries: list[Array] | None = None,
        future: list[Array] | None = None,
        gathered: list[Any] | None = None,
    ) -> list[Array]:
        """The scorer's verdict on every row, `[kv_heads, rows]`, one a layer.

        Parameters
        ----------
        document : int
            What is random differs between documents.
        queries, future : list of array, [query_heads, positions, dim], one a layer
            Of the last tokens, and of those to come.
        gathered : list
            `layers` of a finished `Gathering`; then no queries are needed.
        """
        evictable = self.protected.evictable(cached.keys[0].shape[-2])
        views = [
            self.view(
                layer, *content, evictable, seed=(document, layer),
                queries=queries[layer] if queries else None,
                future=future[layer] if future else None,
                gathered=gathered[layer] if gathered else None,
            )
            for layer, content in enumerate(zip(cached.keys, cached.values, cached.positions, strict=True))
        ]  # fmt: skip
        return scores_of_layers(self.scorer, views)

    def scored_by(self, document: int) -> Hashable:
        """All that scores of a document depend on but the document itself: a key for `SharedScores`."""
        method = f"{type(self.scorer).__module__}.{self.scorer}"  # dataclasses print all their parameters
        calibration = self.statistics and self.statistics.digest
        return ("scores", method, self.budget.sinks, self.budget.recent, document, calibration)

    def select(self, scores: list[Array]) -> list[Array]:
        """The rows that scores `[kv_heads, rows]` say to keep in every layer, `[kv_heads, kept]` each."""
        kept = select_layers(scores, self.protected)
        expected = (self.backend.shape.kv_heads, self.budget.tokens)
        for layer, chosen in enumerate(kept):
            if tuple(chosen.shape) != expected:
                raise RuntimeError(f"layer {layer} kept {tuple(chosen.shape)} tokens, the budget says {expected}")
        return kept

    def all_rows(self, cached: Prefill | Contents) -> list[Array]:
        """Every row of every layer, `[kv_heads, rows]` each."""
        rows = np.arange(cached.keys[0].shape[-2])
        return [like(np.tile(rows, (self.backend.shape.kv_heads, 1)), keys) for keys in cached.keys]

    def choose(self, cached: Prefill | Contents, document: int = 0, *observed: Any) -> list[Array]:
        """The rows that the method keeps in every layer, `[kv_heads, kept]` each; arguments as of `scores`."""
        if self.keeps_all(cached):
            return self.all_rows(cached)
        return self.select(self.scores(cached, document, *observed))

    def store(self, prefill: Prefill, kept: list[Array] | None, batch: int = 1) -> Cache:
        """A cache of the kept tokens `[kv_heads, kept]` of every layer of a prefill, or of all."""
        return self.backend.compress(prefill, kept, self.storage, batch)

    def recompress(self, cache: Cache, document: int, queries: list[Array], future: list[Array] | None = None) -> Cache:
        """Bring a cache that has grown back to the budget.

        `queries` are those of the tokens fed last; a method looks at as many of them as it wants.
        """
        if self.scorer is None:
            return cache
        wanted = observed(self.scorer, queries[0].shape[1])
        seen = [q[:, q.shape[1] - wanted :] for q in queries] if wanted else None
        return self.backend.recompress(cache, self.choose(self.backend.contents(cache), document, seen, future))
