"""Stage 1: run the prompt once, and measure the full cache on the continuation. Shared by all jobs of a process."""

import time
from collections import OrderedDict

import numpy as np

from spectral_kv.backends.base import Backend, Cache, Extension, Prefill
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import Array, like


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
    """

    def __init__(self, backend: Backend, document: np.ndarray, tokens: int, observe: int):
        self.backend, self.document = backend, document
        backend.synchronize()
        start = time.perf_counter()
        self.prefill: Prefill = backend.prefill(document[:tokens], observe)
        backend.synchronize()
        self.seconds = time.perf_counter() - start
        self._extensions: dict[int | tuple, Extension] = {}
        self._answers: dict[tuple[bytes, int], list[int]] = {}

    @property
    def continuation(self) -> np.ndarray:
        return self.document[len(self.prefill.tokens) :]

    @property
    def observed(self) -> int:
        return self.prefill.queries[0].shape[1]

    def queries(self, count: int) -> list[Array] | None:
        """Rotated queries `[query_heads, count, dim]` of the last `count` prompt tokens, one a layer."""
        return [q[:, self.observed - count :] for q in self.prefill.queries] if count else None

    def extended(self, count: int) -> Extension:
        """Logits and queries of the first `count` continuation tokens, fed at once on top of the full cache."""
        if count not in self._extensions:
            cache = self.backend.compress(self.prefill, None, Dense())
            self._extensions[count] = self.backend.extend(cache, self.continuation[:count])
        return self._extensions[count]

    def answer(self, question: np.ndarray, count: int) -> list[int]:
        """The full cache's `count` tokens after a question `[tokens]` that is fed after the prompt."""
        key = (question.tobytes(), count)
        if key not in self._answers:
            cache = self.backend.compress(self.prefill, None, Dense())
            self._answers[key] = answer(self.backend, cache, question, count)
        return self._answers[key]

    def extended_near(self, count: int, sinks: int, recent: int) -> Extension:
        """The same on a cache of the first `sinks` and the last `recent` prompt tokens alone."""
        key = (count, sinks, recent)
        if key not in self._extensions:
            tokens = len(self.prefill.tokens)
            near = np.union1d(np.arange(min(sinks, tokens)), np.arange(max(tokens - recent, 0), tokens))
            kept = [like(np.tile(near, (len(keys), 1)), keys) for keys in self.prefill.keys]
            cache = self.backend.compress(self.prefill, kept, Dense())
            self._extensions[key] = self.backend.extend(cache, self.continuation[:count])
        return self._extensions[key]

    @property
    def nbytes(self) -> int:
        extensions = (x for e in self._extensions.values() for x in (e.logits, *e.queries))
        return self.prefill.nbytes + sum(x.nbytes for x in extensions)


class FullRuns:
    """Full runs by what determines them, the least recently used dropped when they outgrow a bound."""

    def __init__(self):
        self._runs: OrderedDict[tuple, FullRun] = OrderedDict()

    def get(
        self, key: tuple, backend: Backend, document: np.ndarray, tokens: int, observe: int, limit: int
    ) -> tuple[FullRun, bool]:
        """The full run of a document of which the first `tokens` are the prompt, and whether it had to be computed.

        `key` identifies the backend, `observe` is the least number of remembered queries, `limit` is the bound in
        bytes.
        """
        key = (key, tokens, document.tobytes())
        run = self._runs.get(key)
        fresh = run is None or run.observed < observe
        if fresh:
            self._runs[key] = run = FullRun(backend, document, tokens, observe)
        self._runs.move_to_end(key)
        while len(self._runs) > 1 and sum(r.nbytes for r in self._runs.values()) > limit:
            self._runs.popitem(last=False)
        return run, fresh

    def clear(self) -> None:
        self._runs.clear()
