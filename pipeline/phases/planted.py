"""Planted: how many of the tokens that matter by construction were kept."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.xp import to_numpy


@dataclass(frozen=True)
class Planted:
    """Share of the planted tokens that were kept, of each layer and over all of them.

    Counted are planted tokens that could have been evicted: not those among sinks and recent window. A document
    without any has no such value.
    """

    seeks: ClassVar[bool] = True
    needs: ClassVar[int] = 0

    def measure(self, context: Context) -> list[Row]:
        tokens, kept = context.prefill.tokens, context.kept
        planted = context.backend.planted(tokens)
        recall = np.ones(context.backend.shape.layers)
        if kept is not None:
            evictable = context.evictable
            planted = planted[(planted >= evictable.start) & (planted < evictable.stop)]
            if not len(planted):
                return []
            recall = np.array([np.mean([np.isin(planted, to_numpy(head)) for head in layer]) for layer in kept])
        rows: list[Row] = [
            {"layer": layer, "metric": "planted/recall", "value": float(value)} for layer, value in enumerate(recall)
        ]
        return [*rows, {"metric": "planted/recall", "value": float(recall.mean())}]
