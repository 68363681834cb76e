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


def choose(
    cached: Prefill | Contents,
    backend: Backend,
    scorer: Scorer,
    budget: Budget,
    document: int,
    statistics: QueryStatistics | None,
    queries: list[Array] | None = None,
    future: list[Array] | None = None,
) -> list[Array]:
    """The rows that `scorer` keeps in every layer, `[kv_heads, kept]` each.

    `queries` (of the last tokens) and `future` (those to come) are `[query_heads, positions, dim]`, one a layer.
    """
    tokens = cached.keys[0].shape[-2]
    if budget.tokens >= tokens:  # nothing to choose, and perhaps nothing that may be evicted
        everything = np.tile(np.arange(tokens), (backend.shape.kv_heads, 1))
        return [like(everything, keys) for keys in cached.keys]
    scores = []
    for layer, (keys, values, positions) in enumerate(zip(cached.keys, cached.values, cached.positions, strict=True)):
        view = LayerView(
            keys, values, backend.rope, positions, budget.evictable(tokens), layer, (document, layer), backend.scaling,
            queries[layer] if queries else None, future[layer] if future else None, statistics,
        )  # fmt: skip
        scores.append(scorer.score(view))
    kept = select_layers(scores, budget)
    expected = (backend.shape.kv_heads, budget.tokens)
    for layer, chosen in enumerate(kept):
        if tuple(chosen.shape) != expected:
            raise RuntimeError(f"layer {layer} kept {tuple(chosen.shape)} tokens, the budget says {expected}")
    return kept


def compress(
    full: FullRun,
    backend: Backend,
    scorer: Scorer | None,
    budget: Budget | None,
    storage: Storage,
    document: int,
    statistics: QueryStatistics | None,
) -> Compressed:
    """Compress a prefill; without a scorer every token is kept and only stored."""
    queries = full.queries(observed(scorer, len(full.prefill.tokens)))
    future = full.extended(scorer.positions).queries if foresees(scorer) else None
    backend.synchronize()
    start = time.perf_counter()
    kept = None
    if scorer is not None:
        kept = choose(full.prefill, backend, scorer, budget, document, statistics, queries, future)
    cache = backend.compress(full.prefill, kept, storage)
    backend.synchronize()
    return Compressed(cache, kept, time.perf_counter() - start)
