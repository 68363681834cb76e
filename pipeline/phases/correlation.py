"""Correlation: how far a method's ranking of tokens is that of something simpler."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import rankdata

from pipeline.phases.base import Context, Row
from spectral_kv.scorers.base import Scorer
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.xp import to_numpy

SIMPLER: dict[str, Scorer] = {"knorm": Knorm(), "keydiff": KeyDiff(), "recency": Streaming()}


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of every row of `[heads, tokens]` with its like, `[heads]`; NaN where all of a row are equal."""
    a, b = (rankdata(x, axis=-1) for x in (a, b))
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), scale, out=np.full(len(a), np.nan), where=scale > 0)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation between the method's scores and those of Knorm, KeyDiff and recency, over the tokens
    that may be evicted; by layer and in all, means over KV heads. A method that keeps all tokens has none.
    """

    needs: ClassVar[int] = 0

    def measure(self, context: Context) -> list[Row]:
        if context.scores is None:
            return []
        middle = context.evictable
        rows: list[Row] = []
        for name, scorer in SIMPLER.items():
            pairs = zip(context.scores, context.scores_by(scorer), strict=True)
            layers = [spearman(*(to_numpy(x)[:, middle] for x in pair)) for pair in pairs]
            metric = f"correlation/{name}"
            rows += [
                {"layer": layer, "metric": metric, "value": float(np.nanmean(found))}
                for layer, found in enumerate(layers)
                if not np.isnan(found).all()
            ]
            if not np.isnan(layers).all():
                rows.append({"metric": metric, "value": float(np.nanmean(layers))})
        return rows
