"""From tidy rows to numbers with their spread; the only place that averages."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import bootstrap, norm, t

RESAMPLES = 10_000
FEWEST = 5  # documents that an interval needs


@dataclass(frozen=True)
class Estimate:
    """Mean over documents, or a statistic of it, and its 95 % interval (NaN with fewer than five documents)."""

    mean: float
    low: float
    high: float


def interval(samples: tuple[np.ndarray, ...], statistic: Callable) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of paired samples `[documents]`.

    Percentiles of resampled documents, at a level that makes up for their being few: plain percentiles cover the truth
    in 88 % of the cases with 8 documents (Hesterberg, "What teachers should know about the bootstrap", 2015: expanded
    percentile interval).
    """
    n = len(samples[0])
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1))
    found = bootstrap(
        samples, statistic, paired=True, n_resamples=RESAMPLES, confidence_level=1 - 2 * tail, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def estimate(values: np.ndarray) -> Estimate:
    """Mean of one value a document with its interval; equal values have no spread."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean) if len(values) > 1 else Estimate(mean, np.nan, np.nan)
    if len(values) < FEWEST:
        return Estimate(mean, np.nan, np.nan)
    return Estimate(mean, *interval((values,), np.mean))


def difference(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """Mean difference of two methods on the same documents, one value a document, with its paired interval."""
    return estimate(np.asarray(values, dtype=float) - np.asarray(reference, dtype=float))


def gap_closed(values: np.ndarray, random: np.ndarray, oracle: np.ndarray) -> Estimate:
    """`(random - method) / (random - oracle)` of means over the same documents, with its paired interval.

    0 is as good as random tokens, 1 as the oracle's.
    """

    def share(method: np.ndarray, chance: np.ndarray, bound: np.ndarray, axis: int = -1) -> np.ndarray:
        worst = chance.mean(axis=axis)
        return (worst - method.mean(axis=axis)) / (worst - bound.mean(axis=axis))

    samples = tuple(np.asarray(x, dtype=float) for x in (values, random, oracle))
    value = float(share(*samples))
    if len(samples[0]) < FEWEST:
        return Estimate(value, np.nan, np.nan)
    return Estimate(value, *interval(samples, share))


def aggregate(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Estimates of the document-level metrics in tidy `rows`: those without layer, turn and depth."""
    groups = _whole(rows).groupby("metric", sort=True)
    return {metric: estimate(group["value"].to_numpy(dtype=float)) for metric, group in groups}


def per_turn(rows: pd.DataFrame) -> dict[int, dict[str, Estimate]]:
    """Estimates by turn of the metrics that have turns."""
    turns = rows[rows["turn"].notna()]
    return {
        int(turn): {metric: estimate(g["value"].to_numpy()) for metric, g in group.groupby("metric", sort=True)}
        for turn, group in turns.groupby("turn")
    }


def per_document(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a document, one column a metric, of the document-level values in tidy `rows`."""
    return _whole(rows).pivot(index="document", columns="metric", values="value").astype(float)


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a value of a whole document."""
    finer = rows.columns.intersection(["layer", "turn", "depth"])
    return rows[rows[finer].isna().all(axis=1)]
