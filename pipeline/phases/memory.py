"""Memory: bytes of every tensor that must live to continue decoding, and tokens kept."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from pipeline.stages.compress import importance, timed
from spectral_kv.at_rest.content import AtRest


@dataclass(frozen=True)
class Memory:
    """Bytes after compression and after `generated` further tokens, beside the full cache's.

    Decimal megabytes; allocated bytes include room to grow. The full cache holds all tokens in the dtype of the cache.
    Bases that a storage reads are a constant of the model: they are no part of any cache, and stand beside it. A cache
    at rest is measured as the file that it would be; megabytes a second are those of the full cache.
    """

    generated: int = 64

    needs: ClassVar[int] = 0

    def __post_init__(self):
        if self.generated < 1:
            raise ValueError(f"phase.memory.generated={self.generated} must be at least 1")

    def measure(self, context: Context) -> list[Row]:
        prefill, cache = context.prefill, context.compressed_cache()
        full = sum(x.nbytes for x in (*prefill.keys, *prefill.values))
        after = cache.copy()
        context.backend.grow(after, self.generated)
        kept = len(prefill.tokens) if context.kept is None else context.mean_kept
        values = {
            "memory/bytes": cache.nbytes,
            "memory/mb": cache.nbytes / 1e6,
            "memory/mb_after_generation": after.nbytes / 1e6,
            "memory/allocated_mb_after_generation": after.allocated / 1e6,
            "memory/full_mb": full / 1e6,
            "memory/ratio": full / cache.nbytes,
            "memory/tokens": kept,
        }
        storage, shape = context.compressor.storage, context.backend.shape
        if hasattr(storage, "read"):
            values["memory/bases_mb"] = storage.read((shape.layers, shape.kv_heads, shape.dim)).nbytes / 1e6
        if getattr(storage, "at_rest", False):
            values |= self._at_rest(context, full)
        return [{"metric": name, "value": float(value)} for name, value in values.items()]

    @staticmethod
    def _at_rest(context: Context, full: int) -> dict[str, float]:
        backend, prefill, storage = context.backend, context.prefill, context.compressor.storage
        shape = (backend.shape.layers, backend.shape.kv_heads, backend.shape.dim)
        positions = np.arange(len(prefill.tokens))
        if context.scores is not None:
            storage = storage.weighing(importance(context.scores))

        def write() -> bytes:
            return storage.encode(prefill.keys, prefill.values, positions, backend.rope).to_bytes()

        written, writing = timed(backend, write)
        _, reading = timed(
            backend, lambda: storage.decode(AtRest.from_bytes(written), shape, backend.rope, prefill.keys[0])
        )
        return {
            "memory/at_rest_mb": len(written) / 1e6,
            "memory/at_rest_ratio": full / len(written),
            "time/encode_mb_s": full / 1e6 / writing,
            "time/decode_mb_s": full / 1e6 / reading,
        }
