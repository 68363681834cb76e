"""Throughput: decoding speed of the compressed and of the full cache, interleaved."""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.backends.base import Cache
from spectral_kv.storage.dense import Dense


@dataclass(frozen=True)
class Throughput:
    """Greedy decoding after the prompt, timed on the first documents.

    Full and compressed cache take turns, in pairs of a fraction of a second, and the one that goes first changes from
    pair to pair and from document to document: what else the machine does falls on both alike. A document's speed-up
    is the median of its pairs; every run has one baseline, its own.

    Beside milliseconds a step stands `x_floor`, that time over the one in which the device copies the bytes that the
    step has to read once, weights and live cache. Where the backend decodes by captured steps or from codes, the same
    pairs are timed by the model's eager forward passes as well: `eager_speedup` is what other tables call speed-up. On
    a GPU it is near 1 whatever is evicted, because the host, which starts a thousand kernels a step, sets the pace.

    Parameters
    ----------
    tokens : int
        Decoded tokens that are timed.
    repeats : int
        How many pairs are timed.
    warmup : int
        Tokens decoded first, on each cache, outside the clock.
    batch : int
        Equal sequences decoded together.
    documents : int
        How many documents are timed.
    """

    tokens: int = 32
    repeats: int = 6
    warmup: int = 3
    batch: int = 1
    documents: int = 5

    predicts: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("tokens", "repeats", "batch", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"phase.throughput.{name}={getattr(self, name)} must be at least 1")
        if self.warmup < 0:
            raise ValueError(f"phase.throughput.warmup={self.warmup} can't be negative")

    @property
    def needs(self) -> int:
        return 1  # the first token that is fed

    def measure(self, context: Context) -> list[Row]:
        if context.document >= self.documents:
            return []
        backend, full, compressed = context.backend, context.full, context.compressed
        storage = context.compressor.storage
        caches = {
            "full": backend.compress(full.prefill, None, Dense(), self.batch),
            "compressed": backend.compress(full.prefill, compressed.kept, storage, self.batch, compressed.refitted),
        }
        for cache in caches.values():
            backend.generate(cache.copy(), int(full.continuation[0]), self.warmup)
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        eager: dict[str, list[float]] = {name: [] for name in caches}
        stepped = any(backend.steps(cache) for cache in caches.values())
        peaks: dict[str, int] = {}
        for pair in range(self.repeats):
            for name in list(caches)[:: 1 if (pair + context.document) % 2 == 0 else -1]:
                backend.peak_bytes()
                seconds[name].append(self._timed(context, caches[name]))
                if (peak := backend.peak_bytes()) is not None:
                    peaks[name] = peak
                if stepped:
                    with backend.eagerly():
                        eager[name].append(self._timed(context, caches[name]))
        speed = {name: self.tokens * self.batch / np.array(s) for name, s in seconds.items()}
        ratio = np.array(seconds["full"]) / np.array(seconds["compressed"])
        values = {
            "throughput/tok_s": np.median(speed["compressed"]),
            "throughput/full_tok_s": np.median(speed["full"]),
            "throughput/speedup": np.median(ratio),
            "throughput/speedup_least": ratio.min(),
            "throughput/speedup_most": ratio.max(),
            "throughput/prefill_s": full.seconds,
            "throughput/compress_s": compressed.seconds,
        }
        for prefix, name in (("", "compressed"), ("full_", "full")):
            step = np.median(seconds[name]) / self.tokens
            values[f"throughput/{prefix}ms_step"] = 1e3 * step
            if (floor := backend.floor_seconds(caches[name])) is not None:
                values[f"throughput/{prefix}x_floor"] = step / floor
        if stepped:
            values["throughput/eager_tok_s"] = self.tokens * self.batch / np.median(eager["compressed"])
            values["throughput/eager_speedup"] = np.median(np.array(eager["full"]) / np.array(eager["compressed"]))
        values |= {f"throughput/{name}_peak_mb": peak / 1e6 for name, peak in peaks.items()}
        return [{"metric": name, "value": float(value)} for name, value in values.items()]

    def _timed(self, context: Context, cache: Cache) -> float:
        """Seconds that decoding took; room to grow is made before the clock starts."""
        backend, first = context.backend, int(context.full.continuation[0])
        copy = cache.copy()
        backend.ready(copy, self.tokens)
        backend.synchronize()
        start = time.perf_counter()
        backend.generate(copy, first, self.tokens)
        backend.synchronize()
        return time.perf_counter() - start
