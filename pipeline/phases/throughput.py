"""Throughput: decoding speed of the compressed and of the full cache, interleaved, and whether they say the same."""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.backends.base import Cache
from spectral_kv.storage.dense import Dense


def matching_prefix(one: list[int], other: list[int]) -> int:
    """Number of tokens before the first that differs."""
    different = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return different[0] if different else len(one)


@dataclass(frozen=True)
class Throughput:
    """Greedy decoding after the prompt, timed on the first documents.

    Full and compressed cache take turns, so that both see the same machine; every run has one baseline, its own.

    Parameters
    ----------
    tokens : int
        Decoded tokens that are timed, and compared.
    repeats : int
        How many times each cache is timed.
    warmup : int
        Tokens decoded first, on each cache, outside the clock.
    batch : int
        Equal sequences decoded together.
    documents : int
        How many documents are timed.
    """

    tokens: int = 128
    repeats: int = 5
    warmup: int = 3
    batch: int = 1
    documents: int = 1

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
            "compressed": backend.compress(full.prefill, compressed.kept, storage, self.batch),
        }
        for cache in caches.values():
            backend.generate(cache.copy(), int(full.continuation[0]), self.warmup)
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        said: dict[str, list[int]] = {}
        peaks: dict[str, int] = {}
        for _ in range(self.repeats):
            for name, cache in caches.items():
                backend.peak_bytes()
                said[name], took = self._timed(context, cache)
                seconds[name].append(took)
                if (peak := backend.peak_bytes()) is not None:
                    peaks[name] = peak
        with backend.other_kernel():
            again = backend.generate(caches["full"].copy(), int(full.continuation[0]), self.tokens)
        speed = {name: self.tokens * self.batch / np.array(s) for name, s in seconds.items()}
        ratio = np.array(seconds["full"]) / np.array(seconds["compressed"])
        values = {
            "throughput/tok_s": np.median(speed["compressed"]),
            "throughput/tok_s_q25": np.quantile(speed["compressed"], 0.25),
            "throughput/tok_s_q75": np.quantile(speed["compressed"], 0.75),
            "throughput/full_tok_s": np.median(speed["full"]),
            "throughput/speedup": np.median(ratio),
            "throughput/speedup_q25": np.quantile(ratio, 0.25),
            "throughput/speedup_q75": np.quantile(ratio, 0.75),
            "throughput/prefill_s": full.seconds,
            "throughput/compress_s": compressed.seconds,
            "match/tokens": np.mean(np.array(said["compressed"]) == np.array(said["full"])),
            "match/prefix": matching_prefix(said["compressed"], said["full"]),
            "match/noise_floor_tokens": np.mean(np.array(again) == np.array(said["full"])),
            "match/noise_floor_prefix": matching_prefix(again, said["full"]),
        }
        values |= {f"throughput/{name}_peak_mb": peak / 1e6 for name, peak in peaks.items()}
        return [{"metric": name, "value": float(value)} for name, value in values.items()]

    def _timed(self, context: Context, cache: Cache) -> tuple[list[int], float]:
        """Decoded tokens and the seconds they took; room to grow is made before the clock starts."""
        backend, first = context.backend, int(context.full.continuation[0])
        copy = cache.copy()
        copy.reserve(self.tokens)
        backend.synchronize()
        start = time.perf_counter()
        said = backend.generate(copy, first, self.tokens)
        backend.synchronize()
        return said, time.perf_counter() - start
