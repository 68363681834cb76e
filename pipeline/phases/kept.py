"""Kept: where in the prompt the kept tokens are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.xp import to_numpy


@dataclass(frozen=True)
class Kept:
    """Share of every stretch of `width` prompt tokens that is kept, by layer, over KV heads.

    Of the first `documents` documents; `position` is the first token of a stretch. `kept/depth` is the mean place of
    the kept tokens of any document, 0 at the prompt's beginning and 1 at its end. `kept/odd` is the share of odd places
    among those that the method chose, sinks and recent window left out: half, unless it prefers places on a grid.
    """

    width: int = 16
    documents: int = 1

    needs: ClassVar[int] = 0

    def __post_init__(self):
        if self.width < 1 or self.documents < 0:
            raise ValueError(
                f"phase.kept.width={self.width} must be at least 1 and phase.kept.documents={self.documents} at least 0"
            )

    def measure(self, context: Context) -> list[Row]:
        tokens, chosen = len(context.prefill.tokens), context.kept
        starts = np.arange(0, tokens, self.width)
        lengths = np.diff([*starts, tokens])
        rows: list[Row] = []
        depths, odd = [], []
        for layer in range(context.backend.shape.layers):
            heads = [np.arange(tokens)] if chosen is None else [to_numpy(head) for head in chosen[layer]]
            kept = np.concatenate(heads)
            depths.append(kept.mean() / (tokens - 1))
            free = kept[(kept >= context.evictable.start) & (kept < context.evictable.stop)]
            odd.append(np.mean(free % 2) if len(free) else np.nan)
            if context.document < self.documents:
                counts = np.bincount(kept // self.width, minlength=len(starts))
                rows += [
                    {"layer": layer, "position": int(start), "metric": "kept/share", "value": float(share)}
                    for start, share in zip(starts, counts / lengths / len(heads), strict=True)
                ]
        rows.append({"metric": "kept/depth", "value": float(np.mean(depths))})
        if not np.isnan(odd).all():
            rows.append({"metric": "kept/odd", "value": float(np.nanmean(odd))})
        return rows
