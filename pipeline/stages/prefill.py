"""Stage 1: run the prompt once, and measure the full cache on the continuation. Shared by all jobs of a process."""

import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from spectral_kv.backends.base import Backend, Extension, Prefill
from spectral_kv.storage import Dense

OBSERVED = 64  # last prompt tokens whose queries are remembered


@dataclass(frozen=True)
class FullRun:
    """A document on the full cache: what every compressed cache is compared with. Nothing changes it.

    Parameters
    ----------
    document : np.ndarray of int, [tokens + continuation]
    prefill : Prefill
    extension : Extension
        Logits and queries of the continuation, fed on top of the full cache.
    seconds : float
        Wall time of the prefill.
    """

    document: np.ndarray
    prefill: Prefill
    extension: Extension
    seconds: float

    @property
    def continuation(self) -> np.ndarray:
        return self.document[len(self.prefill.tokens) :]

    @property
    def nbytes(self) -> int:
        return self.prefill.nbytes + self.extension.logits.nbytes + sum(q.nbytes for q in self.extension.queries)


class FullRuns:
    """Full runs by what determines them, the least recently used dropped when they outgrow a bound."""

    def __init__(self):
        self._runs: OrderedDict[tuple, FullRun] = OrderedDict()

    def get(self, key: tuple, backend: Backend, document: np.ndarray, tokens: int, limit: int) -> tuple[FullRun, bool]:
        """The full run of a document of which the first `tokens` are the prompt, and whether it had to be computed.

        Parameters
        ----------
        key : tuple
            Everything outside the document that changes the result: model, backend and their settings.
        limit : int
            Bytes that kept runs may take; the newest is kept in any case.
        """
        key = (*key, tokens, document.tobytes())
        if key in self._runs:
            self._runs.move_to_end(key)
            self._shrink(limit)
            return self._runs[key], False
        start = time.perf_counter()
        prefill = backend.prefill(document[:tokens], OBSERVED)
        backend.synchronize()
        seconds = time.perf_counter() - start
        extension = backend.extend(backend.compress(prefill, None, Dense()), document[tokens:])
        self._runs[key] = run = FullRun(document, prefill, extension, seconds)
        self._shrink(limit)
        return run, True

    def _shrink(self, limit: int) -> None:
        while len(self._runs) > 1 and sum(r.nbytes for r in self._runs.values()) > limit:
            self._runs.popitem(last=False)

    def clear(self) -> None:
        self._runs.clear()
