"""A method on a model: what it observes, which tokens it keeps, and how they are held.

observe -> score -> select -> store -> extend, and again when the cache has grown
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from spectral_kv.backends.base import Backend, Cache, Contents, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.engine.together import in_one_pass, pass_over_keys
from spectral_kv.engine.together import scores as scores_of_layers
from spectral_kv.heads import Heads, held, runs
from spectral_kv.refit import Refit, Refitted
from spectral_kv.scorers.base import LayerView, Repetition, Scorer
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.base import Storage
from spectral_kv.xp import Array, float32, like, namespace

T = TypeVar("T")


def observed(scorer: Scorer | None, tokens: int) -> int:
    """How many of the last queries of a prompt of `tokens` a scorer looks at."""
    if scorer is None or "queries" not in scorer.reads:
        return 0
    return tokens if scorer.window is None else min(scorer.window, tokens)


def foresees(scorer: Scorer | None) -> bool:
    """Whether a scorer is an oracle."""
    return scorer is not None and "future" in scorer.reads


def repeats(scorer: Scorer | None) -> bool:
    """Whether a scorer wants a finished prompt to be repeated."""
    return scorer is not None and "repetition" in scorer.reads


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


def _rows(keys: Heads) -> int:
    """Rows of a layer over its KV heads."""
    return sum(map(len, keys)) if isinstance(keys, list) else keys.shape[0] * keys.shape[1]


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
    encode : function of a text, optional
        Its token ids, for scorers that have the prompt repeated.
    refit : Refit, optional
        What kept tokens are given; by default nothing.
    """

    backend: Backend
    scorer: Scorer | None
    budget: Budget | None
    storage: Storage
    statistics: QueryStatistics | None = None
    encode: Callable[[str], np.ndarray] | None = None
    refit: Refit | None = None

    def __deepcopy__(self, memo: dict) -> "Compressor":
        """Itself: nothing changes it, and a copy of a cache is of the same model."""
        return self

    @property
    def protected(self) -> Budget | None:
        """The budget with the recent window that the scorer wants, where it states one."""
        share = getattr(self.scorer, "recent_share", None)
        return self.budget if share is None else self.budget.with_recent_share(share)

    def remembered(self, every: int | None, append: bool = False, evicted: bool = False) -> int:
        """Of how many last tokens the next eviction while decoding wants queries, where there is one `every` so many.

        As many as the scorer looks at, or if it looks at all those of the tokens since the last eviction; with `append`
        of the recent window, which is all that matters to a token that leaves it. Where some were just `evicted`, of
        tokens that are held: no more than the recent window.
        """
        if every is None or not observed(self.scorer, every):
            return 0
        recent = self.protected.recent
        count = max(self.scorer.window or (recent if append else every), 1)
        return min(count, recent) if evicted else count

    def gathering(self) -> Gathering:
        """Of a prompt that is about to run, for a scorer that `gathers`."""
        return Gathering(self, [None] * self.backend.shape.layers)

    def view(
        self, index: int, keys: Array, values: Array, positions: np.ndarray, evictable: slice, **more
    ) -> LayerView:
        """What the scorer sees of a layer; `more` is what only some scorers read."""
        return LayerView(
            keys, values, self.backend.rope, positions, evictable,
            scaling=self.backend.scaling, index=index, statistics=self.statistics, projection=self.projection(index),
            query_bias=None if getattr(self.scorer, "with_bias", True) else self.backend.query_bias(index),
            **more,
        )  # fmt: skip

    def projection(self, layer: int) -> Array | None:
        """W_O of a layer for a scorer that reads it, `[query_heads, dim, hidden]`."""
        if self.scorer is None or "projection" not in self.scorer.reads:
            return None
        found = self.backend.output_weights(layer)
        if found is None:
            raise ValueError(
                f"{type(self.scorer).__name__} reads W_O, which this model names otherwise: choose another method"
            )
        return found

    def repeated(self, prefill: Prefill) -> list[Array]:
        """What the scorer sees in every layer while the model repeats its prompt, `[kv_heads, tokens]` each."""
        if self.encode is None:
            raise ValueError(
                f"{type(self.scorer).__name__} has the prompt repeated, and no tokenizer turns its instruction into "
                "tokens: pass `encode`"
            )
        parts: list[list[Array]] = [[] for _ in range(self.backend.shape.layers)]
        tokens = len(prefill.tokens)
        for span, fed in self.scorer.repetitions(prefill.tokens, self.encode):

            def watch(layer: int, queries: Array, keys: Array, values: Array, inputs: Array, span=span) -> None:
                seen = Repetition(
                    keys[:, :tokens], values[:, :tokens], span, queries, keys[:, tokens:], inputs,
                    self.backend.scaling, self.projection(layer),
                )  # fmt: skip
                parts[layer].append(self.scorer.repeated(seen))

            self.backend.reread(prefill, fed, watch)
        xp = namespace(prefill.keys[0])
        return [xp.concat(found, axis=-1) for found in parts]

    def keeps_all(self, cached: Prefill | Contents) -> bool:
        """Whether there is nothing to choose, and perhaps nothing that may be evicted."""
        if self.scorer is None:
            return True
        return len(cached.keys) * self.backend.shape.kv_heads * self.budget.tokens >= sum(map(_rows, cached.keys))

    def scores(
        self,
        cached: Prefill | Contents,
        document: int = 0,
        queries: list[Array] | None = None,
        future: list[Array] | None = None,
        gathered: list[Any] | None = None,
        step: tuple[int, ...] = (),
    ) -> list[Array] | Array:
        """The scorer's verdict on every row, `[kv_heads, rows]`, one a layer or all in one array.

        Parameters
        ----------
        document : int
            What is random differs between documents.
        queries, future : list of array, [query_heads, positions, dim], one a layer
            Of the last tokens, and of those to come.
        gathered : list
            `layers` of a finished `Gathering`, then no queries are needed; or what `repeated` returned.
        step : tuple of int
            What is random differs between steps, too.
        """
        contents = list(zip(cached.keys, cached.values, cached.positions, strict=True))
        if any(isinstance(keys, list) for keys in cached.keys):
            return self._scores_by_head(cached, document, queries, future, step)

        def view(layer: int) -> LayerView:
            more = {
                name: given[layer] for name, given in (("queries", queries), ("future", future)) if given is not None
            }
            evictable = self.protected.evictable(contents[layer][0].shape[-2])
            return self.view(
                layer, *contents[layer], evictable, seed=(document, layer, *step),
                gathered=gathered[layer] if gathered else None, **more,
            )  # fmt: skip

        if (found := in_one_pass(self.scorer, view(0), cached, queries)) is not None:
            return found
        return scores_of_layers(self.scorer, [view(layer) for layer in range(len(contents))])

    def _scores_by_head(
        self,
        cached: Contents,
        document: int,
        queries: list[Array] | None,
        future: list[Array] | None,
        step: tuple[int, ...] = (),
    ) -> list[list[Array]]:
        """`scores` where heads hold different numbers of rows: each on its own, `[rows]`."""
        kv_heads, found = self.backend.shape.kv_heads, []
        group = self.backend.shape.query_heads // kv_heads
        for layer, content in enumerate(zip(cached.keys, cached.values, cached.positions, strict=True)):
            projection, own = self.projection(layer), []
            bias = None if getattr(self.scorer, "with_bias", True) else self.backend.query_bias(layer)
            for heads, (keys, values, positions) in runs(*content):
                mine = slice(heads.start * group, heads.stop * group)
                evictable = self.protected.evictable(keys.shape[1])
                if evictable.start == evictable.stop:  # nothing to choose
                    own.append(namespace(keys).zeros_like(float32(keys[0, :, 0])))
                    continue
                view = LayerView(
                    keys, values, self.backend.rope, positions, evictable, scaling=self.backend.scaling, index=layer,
                    seed=(document, layer, heads.start, *step), first_head=heads.start,
                    queries=None if queries is None else queries[layer][mine],
                    future=None if future is None else future[layer][mine],
                    statistics=self.statistics and self.statistics.of_heads(mine),
                    projection=None if projection is None else projection[mine],
                    query_bias=None if bias is None else bias[mine],
                )  # fmt: skip
                own.append(self.scorer.score(view)[0])
            found.append(own)
        return found

    def scored_by(self, document: int) -> Hashable:
        """All that scores of a document depend on but the document itself: a key for `SharedScores`."""
        method = f"{type(self.scorer).__module__}.{self.scorer}"  # dataclasses print all their parameters
        calibration = self.statistics and self.statistics.digest
        return ("scores", method, self.budget.sinks, self.budget.recent, document, calibration)

    def select(self, scores: list[Heads] | Array, later: list[Callable[[], None]] | None = None) -> list[Heads] | Array:
        """The rows that scores `[kv_heads, rows]` say to keep in every layer, `[kv_heads, kept]` each.

        One array, with the layers as its first axis, where scores are one; `later` as in `spectral_kv.selection`.
        """
        kept = select_layers(scores, self.protected, later)
        expected = (self.backend.shape.kv_heads, self.budget.tokens)
        if hasattr(kept, "shape") and tuple(kept.shape[1:]) == expected:
            return kept
        if self.budget.allocation == "uniform":
            for layer, chosen in enumerate(kept):
                if tuple(chosen.shape) != expected:
                    raise RuntimeError(f"layer {layer} kept {tuple(chosen.shape)} tokens, the budget says {expected}")
        total, budget = sum(map(held, kept)), len(kept) * self.backend.shape.kv_heads * self.budget.tokens
        if total != budget:
            raise RuntimeError(f"{total} tokens were kept over layers and KV heads, the budget says {budget}")
        return kept

    def all_rows(self, cached: Prefill | Contents) -> list[Array]:
        """Every row of every layer, `[kv_heads, rows]` each."""

        def of(keys: Heads) -> Heads:
            if isinstance(keys, list):
                return [like(np.arange(len(own)), own) for own in keys]
            return like(np.tile(np.arange(keys.shape[-2]), (len(keys), 1)), keys)

        return [of(keys) for keys in cached.keys]

    def choose(self, cached: Prefill | Contents, document: int = 0, *observed: Any) -> list[Array]:
        """The rows that the method keeps in every layer, `[kv_heads, kept]` each; arguments as of `scores`."""
        if self.keeps_all(cached):
            return self.all_rows(cached)
        return self.select(self.scores(cached, document, *observed))

    def refitted(self, prefill: Prefill, kept: list[Heads] | None) -> list[Refitted] | None:
        """What the kept tokens of every layer are given; the prefill has to remember the queries for it."""
        if self.refit is None or kept is None:
            return None
        tokens, rope = len(prefill.tokens), self.backend.rope
        return [
            self.refit.layer(keys, values, chosen, self.refit.reference(q, tokens, rope), self.backend.scaling)
            for keys, values, chosen, q in zip(prefill.keys, prefill.values, kept, prefill.queries, strict=True)
        ]

    def store(
        self, prefill: Prefill, kept: list[Heads] | None, batch: int = 1, refitted: list[Refitted] | None = None
    ) -> Cache:
        """A cache of the kept tokens `[kv_heads, kept]` of every layer of a prefill, or of all."""
        return self.backend.compress(prefill, kept, self.storage, batch, refitted)

    def select_and_store(
        self, prefill: Prefill, scores: list[Heads] | Array, batch: int = 1
    ) -> tuple[Cache, list[Heads] | Array, list[Refitted] | None]:
        """A cache of the tokens that scores say to keep, their rows, what `refitted` says; a GPU is asked once."""
        if self.refit is None:
            found = self.backend.select_and_compress(prefill, scores, self.protected, self.storage, batch)
            if found is not None:
                return *found, None
        later: list[Callable[[], None]] = []
        kept = self.select(scores, later)
        refitted = self.refitted(prefill, kept)
        cache = self.store(prefill, kept, batch, refitted)
        for question in later:
            question()
        return cache, kept, refitted

    def compress(
        self, prefill: Prefill, document: int = 0, *observed: Any, batch: int = 1
    ) -> tuple[Cache, list[Heads] | Array | None]:
        """A cache of the tokens that the method keeps, and their rows (None: all); arguments as of `scores`.

        Whoever needs the scores themselves, or several budgets of one prompt, asks for `scores` and selects: here a
        GPU computes scores and what follows from them in one captured graph, where there is one.
        """
        if self.scorer is None:
            return self.store(prefill, None, batch), None
        if self.refit is None and self.budget.tokens < len(prefill.tokens):
            first = self.view(
                0, prefill.keys[0], prefill.values[0], prefill.positions[0],
                self.protected.evictable(len(prefill.tokens)),
            )  # fmt: skip
            scores = pass_over_keys(self.scorer, first, prefill.keys)
            if scores is not None:
                found = self.backend.select_and_compress(prefill, scores, self.protected, self.storage, batch)
                if found is not None:
                    return found
        if self.keeps_all(prefill):
            kept = self.all_rows(prefill)
            return self.store(prefill, kept, batch, self.refitted(prefill, kept)), kept
        cache, kept, _ = self.select_and_store(prefill, self.scores(prefill, document, *observed), batch)
        return cache, kept

    def recompress(
        self,
        cache: Cache,
        document: int,
        queries: list[Array],
        future: list[Array] | None = None,
        step: tuple[int, ...] = (),
    ) -> Cache:
        """Bring a cache that has grown back to the budget.

        `queries` are those of the tokens fed last; a method looks at as many of them as it wants. What is random
        differs between documents and steps.
        """
        if self.scorer is None:
            return cache
        wanted = observed(self.scorer, queries[0].shape[1])
        seen = [q[:, q.shape[1] - wanted :] for q in queries] if wanted else None
        kept = self.choose(self.backend.contents(cache), document, seen, future, None, step)
        return self.backend.recompress(cache, kept)
