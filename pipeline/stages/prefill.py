"""Stage 1: run the prompt once, and measure the full cache on the continuation. Shared by all jobs of a process."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import numpy as np

from pipeline.stages.prefill_cache import PrefillCache
from spectral_kv.backends.base import Backend, Cache, Extension, Prefill
from spectral_kv.backends.measuring import MeasuredBackend
from spectral_kv.compressor import SharedScores
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import Array, like

T = TypeVar("T")


def _arrays(x: Any) -> Iterator[Array]:
    """Every array in a result of measuring."""
    if hasattr(x, "nbytes"):
        yield x
    elif isinstance(x, Extension):
        yield from (x.logits, *x.queries)
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _arrays(part)


def answer(backend: Backend, cache: Cache, question: np.ndarray, count: int) -> list[int]:
    """Feed a question `[tokens]` to a cache, which grows, then decode `count` tokens greedily."""
    if len(question) > 1:
        backend.extend(cache, question[:-1])
    return backend.generate(cache, int(question[-1]), count)


class FullRun:
    """A document on the full cache: what every compressed cache is compared with.

    Parameters
    ----------
    backend : Backend
    document : np.ndarray of int, [tokens + continuation]
    tokens : int
        Length of the prompt.
    observe : int
        How many of the last queries of the prompt are remembered.
    kept : tuple of Prefill and float, optional
        The prefill, and the seconds that it took, if it need not be computed.
    chunk : int, optional
        Tokens of the prompt that are fed at once; all if None.
    """

    def __init__(
        self,
        backend: MeasuredBackend,
        document: np.ndarray,
        tokens: int,
        observe: int,
        kept: tuple[Prefill, float] | None = None,
        chunk: int | None = None,
    ):
        self.backend, self.document, self.chunk = backend, document, chunk
        self.peak: int | None = None  # most bytes allocated while the prompt ran, where somebody counts them
        self.prefill, self.seconds = kept or self._computed(document[:tokens], observe)
        self._found: dict[Hashable, Any] = {}

    def _computed(self, prompt: np.ndarray, observe: int) -> tuple[Prefill, float]:
        self.backend.synchronize()
        self.backend.peak_bytes()
        start = time.perf_counter()
        prefill = self.backend.prefill(prompt, observe, self.chunk)
        self.backend.synchronize()
        seconds = time.perf_counter() - start
        self.peak = self.backend.peak_bytes()
        return prefill, seconds

    @property
    def continuation(self) -> np.ndarray:
        return self.document[len(self.prefill.tokens) :]

    @property
    def observed(self) -> int:
        return self.prefill.queries[0].shape[1]

    def queries(self, count: int) -> list[Array] | None:
        """Rotated queries `[query_heads, count, dim]` of the last `count` prompt tokens, one a layer."""
        return [q[:, self.observed - count :] for q in self.prefill.queries] if count else None

    def once(self, key: Hashable, measured: Callable[[], T]) -> T:
        """What `measured` returns, computed for the first method that asks and kept for the others.

        `key` names it and everything but the document that it depends on. Arrays in it, alone or in lists and tuples,
        count towards `nbytes`.
        """
        if key not in self._found:
            self._found[key] = measured()
        return self._found[key]

    def extended(self, count: int) -> Extension:
        """Logits and queries of the first `count` continuation tokens, fed at once on top of the full cache."""

        def fed() -> Extension:
            cache = self.backend.compress(self.prefill, None, Dense())
            return self.backend.extend(cache, self.continuation[:count])

        return self.once(("extended", count), fed)

    def answer(self, question: np.ndarray, count: int) -> list[int]:
        """The full cache's `count` tokens after a question `[tokens]` that is fed after the prompt."""

        def said() -> list[int]:
            cache = self.backend.compress(self.prefill, None, Dense())
            return answer(self.backend, cache, question, count)

        return self.once(("answer", question.tobytes(), count), said)

    def extended_near(self, count: int, sinks: int, recent: int) -> Extension:
        """Like `extended`, on a cache of the first `sinks` and the last `recent` prompt tokens alone; not kept."""
        tokens = len(self.prefill.tokens)
        near = np.union1d(np.arange(min(sinks, tokens)), np.arange(max(tokens - recent, 0), tokens))
        kept = [like(np.tile(near, (len(keys), 1)), keys) for keys in self.prefill.keys]
        cache = self.backend.compress(self.prefill, kept, Dense())
        return self.backend.extend(cache, self.continuation[:count])

    @property
    def nbytes(self) -> int:
        return self.prefill.nbytes + sum(x.nbytes for x in _arrays(list(self._found.values())))


class FullRuns:
    """Full runs by what determines them, each with the scores that methods share of it.

    The least recently used are dropped when they outgrow a bound.
    """

    def __init__(self):
        self._runs: OrderedDict[tuple, tuple[FullRun, SharedScores]] = OrderedDict()

    def get(
        self,
        key: tuple,
        backend: MeasuredBackend,
        document: np.ndarray,
        tokens: int,
        observe: int,
        limit: int,
        disk: PrefillCache | None = None,
        chunk: int | None = None,
    ) -> tuple[FullRun, SharedScores, str]:
        """The full run of a document of which the first `tokens` are the prompt, and scores of it.

        Also whether it was `computed`, `loaded` from disk or `reused`.

        `key` identifies the backend, `observe` is the least number of remembered queries, `limit` is the bound in
        bytes.
        """
        key = (key, tokens, document.tobytes())
        (run, shared), origin = self._runs.get(key, (None, None)), "reused"
        if run is None or run.observed < observe:
            kept = disk and disk.get(document[:tokens], observe, getattr(backend, "device", "cpu"))
            origin = "loaded" if kept else "computed"
            run, shared = FullRun(backend, document, tokens, observe, kept, chunk), SharedScores()
            self._runs[key] = run, shared
            if disk and not kept:
                disk.put(run.prefill, run.seconds)
        self._runs.move_to_end(key)
        while len(self._runs) > 1 and sum(self._bytes(*pair) for pair in self._runs.values()) > limit:
            self._runs.popitem(last=False)
        return run, shared, origin

    def _bytes(self, run: FullRun, shared: SharedScores) -> int:
        return run.nbytes + sum(x.nbytes for x in _arrays(list(shared.found.values())))

    def clear(self) -> None:
        self._runs.clear()
