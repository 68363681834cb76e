"""How far the orders of the same methods on two models agree."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, kendalltau, norm, t

from pipeline.statistics import FEWEST, LEVEL, RESAMPLES, Estimate


@dataclass(frozen=True)
class Agreement:
    """Agreement of two orders of methods.

    Parameters
    ----------
    tau : Estimate
        Kendall's tau-b of the means, its interval over the documents of both models.
    p : float
        Two-sided, of no relation between the orders.
    """

    tau: Estimate
    p: float


def kendall(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of two arrays `[..., methods]` along their last axis, NaN where one of them is all ties."""
    one, other = np.triu_indices(ours.shape[-1], 1)
    s, t = (np.sign(x[..., one] - x[..., other]) for x in (ours, theirs))
    with np.errstate(invalid="ignore"):
        return (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))


def agreement(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    """How far the order of the same methods agrees on two models, each measured on documents of its own.

    Documents of the two models are resampled apart, those of all methods of a model together; percentiles at the level
    that makes up for their being few, as in `pipeline.statistics.interval`.

    Parameters
    ----------
    ours, theirs : np.ndarray, [methods, documents]
    """
    one, other = ours.mean(axis=1), theirs.mean(axis=1)
    tau = float(kendall(one, other))
    if np.isnan(tau):
        return Agreement(Estimate(np.nan, np.nan, np.nan), np.nan)
    p, fewest = float(kendalltau(one, other).pvalue), min(ours.shape[1], theirs.shape[1])
    if fewest < FEWEST:
        return Agreement(Estimate(tau, np.nan, np.nan), p)

    def statistic(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        means = (np.moveaxis(x[:, drawn].mean(axis=axis), 0, -1) for x, drawn in ((ours, first), (theirs, second)))
        return kendall(*means)

    tail = norm.cdf(np.sqrt(fewest / (fewest - 1)) * t.ppf(LEVEL / 2, fewest - 1))
    found = bootstrap(
        (np.arange(ours.shape[1]), np.arange(theirs.shape[1])), statistic, n_resamples=RESAMPLES, paired=False,
        confidence_level=1 - 2 * tail, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return Agreement(Estimate(tau, *((tau, tau) if np.isnan(low) else (low, high))), p)  # NaN: no resample differs
