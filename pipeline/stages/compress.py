"""Stage 2: score, select and store; what it cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter1d

from pipeline.settings.errors import InputError
from pipeline.stages.prefill import FullRun
from spectral_kv.backends.base import Cache
from spectral_kv.compressor import Compressor, SharedScores, foresees, gathers, observed, repeats
from spectral_kv.refit import Refitted
from spectral_kv.xp import Array, to_numpy

NEIGHBOURS = 17  # tokens over which importance is averaged


@dataclass(frozen=True)
class Compressed:
    """A compressed cache, the kept tokens `[kv_heads, kept]` of every layer (None: all), and the seconds it took.

    `scores` `[kv_heads, tokens]` of every layer are those that decided, None where nothing had to be decided.
    `repetition` are the seconds of feeding the prompt again, for a method that does; `refitted` is what kept tokens
    were given.
    """

    cache: Cache
    kept: list[Array] | None
    seconds: float
    scores: list[Array] | None = None
    repetition: float = 0.0
    refitted: list[Refitted] | None = None


def timed(backend, work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, computed, and the seconds that it took."""
    backend.synchronize()
    start = time.perf_counter()
    result = work()
    backend.synchronize(result)
    return result, time.perf_counter() - start


def remembered(compressor: Compressor, tokens: int, chunk: int | None) -> int:
    """How many of the last queries of a prompt of `tokens` have to be remembered for it to be compressed."""
    count = 0 if chunk and gathers(compressor.scorer) else observed(compressor.scorer, tokens)
    if compressor.refit is not None and compressor.scorer is not None:
        count = max(count, min(compressor.refit.queries, tokens))
    return count


def compress(compressor: Compressor, full: FullRun, shared: SharedScores, document: int) -> Compressed:
    """Compress the prefill of a document.

    The seconds that scoring took count at every budget, though it is done once for all of them.
    """
    backend, prefill = compressor.backend, full.prefill
    kept, scores, scoring, repetition = None, None, 0.0, 0.0
    weighs = getattr(compressor.storage, "weighs", False)
    if compressor.scorer is not None and compressor.keeps_all(prefill) and not weighs:
        kept = compressor.all_rows(prefill)
    elif compressor.scorer is not None:
        scores, scoring, repetition = shared.once(
            compressor.scored_by(document), lambda: _scored(compressor, full, document)
        )
    backend.synchronize()
    start = time.perf_counter()
    refitted = None
    if scores is not None and weighs:
        weighing = compressor.storage.weighing(importance(scores))
        cache = replace(compressor, storage=weighing).store(prefill, None)
    elif scores is None:
        refitted = compressor.refitted(prefill, kept)
        cache = compressor.store(prefill, kept, refitted=refitted)
    else:
        cache, kept, refitted = compressor.select_and_store(prefill, scores)
    backend.synchronize()
    return Compressed(cache, kept, scoring + time.perf_counter() - start, scores, repetition, refitted)


def importance(scores: list[Array]) -> np.ndarray:
    """What scores `[kv_heads, tokens]` of all layers say of a token, `[tokens]`: their mean over a few neighbours.

    Raises
    ------
    InputError
        If none is above 0.
    """
    mean = np.mean([to_numpy(x).astype(np.float64).clip(0, None).mean(axis=0) for x in scores], axis=0)
    if not mean.any():
        raise InputError(
            "tokens at rest are coded as finely as a method's scores say, and none of these is above 0: "
            "choose method=snapkv, h2o, tova, or full to code all alike"
        )
    return uniform_filter1d(mean, NEIGHBOURS, mode="nearest")


def _scored(compressor: Compressor, full: FullRun, document: int) -> tuple[list[Array], float, float]:
    """Scores of a prefill, and the seconds that they took, in all and for feeding the prompt again."""
    scorer, backend = compressor.scorer, compressor.backend
    queries, gathered, gathering, repetition = None, None, 0.0, 0.0
    if repeats(scorer):
        gathered, gathering = timed(backend, lambda: compressor.repeated(full.prefill))
        repetition = gathering
    elif full.chunk and gathers(scorer):
        gathered, gathering = _gathered(compressor, full)
    else:
        queries = full.queries(observed(scorer, len(full.prefill.tokens)))
    future = full.extended(scorer.horizon).queries if foresees(scorer) else None
    scores, scoring = timed(backend, lambda: compressor.scores(full.prefill, document, queries, future, gathered))
    return scores, gathering + scoring, repetition


def _gathered(compressor: Compressor, full: FullRun) -> tuple[list[Any], float]:
    """What the scorer gathers while the prompt runs once more, and the seconds that the gathering alone took."""
    gathering, seconds = compressor.gathering(), []

    def watch(*seen: Any) -> Any:
        result, took = timed(compressor.backend, lambda: gathering(*seen))
        seconds.append(took)
        return result

    compressor.backend.prefill(full.prefill.tokens, 0, full.chunk, watch)
    return gathering.layers, sum(seconds)
