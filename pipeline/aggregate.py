"""From tidy rows to numbers with their spread; the only place that averages."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """Mean over documents and its 95 % interval (NaN with fewer than five documents)."""

    mean: float
    low: float
    high: float


def estimate(values: np.ndarray) -> Estimate:
    """Mean of one value a document with a percentile bootstrap interval; equal values have no spread."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean) if len(values) > 1 else Estimate(mean, np.nan, np.nan)
    if len(values) < 5:
        return Estimate(mean, np.nan, np.nan)
    interval = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def aggregate(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Estimates of the document-level metrics in `rows` (columns document, layer, head, metric, value)."""
    whole = rows[rows["layer"].isna()]
    return {metric: estimate(group["value"].to_numpy()) for metric, group in whole.groupby("metric", sort=True)}
