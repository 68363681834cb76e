"""Match: whether the compressed cache says the same as the full one."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row


def matching_prefix(one: list[int], other: list[int]) -> int:
    """Number of tokens before the first that differs."""
    different = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return different[0] if different else len(one)


@dataclass(frozen=True)
class Match:
    """Greedy decoding after the prompt, token by token beside what the full cache says.

    After the first token that differs the two are in different texts, and equal positions are chance. The noise floor
    is the full cache beside itself in another attention kernel, which rounds differently: no method can be told from
    the full cache above it.

    Parameters
    ----------
    tokens : int
        Decoded tokens that are compared.
    documents : int
        How many documents are decoded.
    """

    tokens: int = 128
    documents: int = 5

    predicts: ClassVar[bool] = True
    needs: ClassVar[int] = 1  # the first token that is fed

    def __post_init__(self):
        for name in ("tokens", "documents"):
            if getattr(self, name) < 1:
                raise ValueError(f"phase.match.{name}={getattr(self, name)} must be at least 1")

    def measure(self, context: Context) -> list[Row]:
        if context.document >= self.documents:
            return []
        backend, first = context.backend, int(context.continuation[0])

        def said_by_the_full_cache() -> tuple[list[int], list[int]]:
            cache = context.full_cache()
            said = backend.generate(cache.copy(), first, self.tokens)
            with backend.other_kernel():
                return said, backend.generate(cache, first, self.tokens)

        said, again = context.once(("match", self.tokens), said_by_the_full_cache)
        ours = backend.generate(context.compressed_cache(), first, self.tokens)
        values = {
            "match/tokens": np.mean(np.array(ours) == np.array(said)),
            "match/prefix": matching_prefix(ours, said),
            "match/noise_floor_tokens": np.mean(np.array(again) == np.array(said)),
            "match/noise_floor_prefix": matching_prefix(again, said),
        }
        return [{"metric": name, "value": float(value)} for name, value in values.items()]
