"""Stage 2: score, select and store; what it cost."""

import time
from dataclasses import dataclass

import numpy as np

from spectral_kv.backends.base import Backend, Cache, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.scorers.base import LayerView, Scorer
from spectral_kv.selection import Budget, select
from spectral_kv.storage import Storage
from spectral_kv.xp import Array, like


@dataclass(frozen=True)
class Compressed:
    """A compressed cache, the kept tokens `[kv_heads, kept]` of every layer (None: all), and the seconds it took."""

    cache: Cache
    kept: list[Array] | None
    seconds: float


def choose(
    prefill: Prefill,
    backend: Backend,
    scorer: Scorer,
    budget: Budget,
    document: int,
    statistics: QueryStatistics | None,
) -> list[Array]:
    """The tokens that `scorer` keeps in every layer, `[kv_heads, kept]` each."""
    tokens = len(prefill.tokens)
    if budget.tokens >= tokens:  # nothing to choose, and perhaps nothing that may be evicted
        everything = np.tile(np.arange(tokens), (backend.shape.kv_heads, 1))
        return [like(everything, keys) for keys in prefill.keys]
    kept = []
    for layer, (keys, values) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
        view = LayerView(
            keys, values, backend.rope, np.arange(tokens), budget.evictable(tokens), layer, (document, layer),
            prefill.queries[layer], statistics,
        )  # fmt: skip
        chosen = select(scorer.score(view), budget)
        expected = (backend.shape.kv_heads, budget.tokens)
        if tuple(chosen.shape) != expected:
            raise RuntimeError(f"layer {layer} kept {tuple(chosen.shape)} tokens, the budget says {expected}")
        kept.append(chosen)
    return kept


def compress(
    prefill: Prefill,
    backend: Backend,
    scorer: Scorer | None,
    budget: Budget | None,
    storage: Storage,
    document: int,
    statistics: QueryStatistics | None,
) -> Compressed:
    """Compress a prefill; without a scorer every token is kept and only stored."""
    backend.synchronize()
    start = time.perf_counter()
    kept = None if scorer is None else choose(prefill, backend, scorer, budget, document, statistics)
    cache = backend.compress(prefill, kept, storage)
    backend.synchronize()
    return Compressed(cache, kept, time.perf_counter() - start)
