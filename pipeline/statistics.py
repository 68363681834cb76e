"""From tidy rows to numbers with their spread, and the tests that decide; the only place that averages.

The unit is the document: a test of a metric is a test of its values, one a document.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap, norm, t, ttest_1samp

RESAMPLES = 10_000
FEWEST = 5  # documents that an interval needs
LEVEL = 0.05  # of every test


@dataclass(frozen=True)
class Estimate:
    """Mean over documents, or a statistic of it, and its 95 % interval.

    The bounds are NaN with fewer than five documents, and where all documents have the same value: that none differs
    tells nothing of how much others would.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of a mean difference (TOST): it is within a margin at the 5 % level if `p` is at most that.

    `low` and `high` are the 90 % interval that lies within the margin then, by Student's t.
    """

    margin: float
    p: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        return self.p <= LEVEL


@dataclass(frozen=True)
class Order:
    """How far an order of means agrees with another one.

    Parameters
    ----------
    tau : Estimate
        Kendall's tau-b, its interval over documents.
    same, reverse : float
        Share of all orders that agree at least as well, or as badly: one-sided permutation tests.
    """

    tau: Estimate
    same: float
    reverse: float


def interval(samples: tuple[np.ndarray, ...], statistic: Callable) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of paired samples `[documents]`.

    Percentiles of resampled documents, at a level that makes up for their being few: plain percentiles cover the truth
    in 88 % of the cases with 8 documents (Hesterberg, "What teachers should know about the bootstrap", 2015: expanded
    percentile interval).
    """
    n = len(samples[0])
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf(LEVEL / 2, n - 1))
    found = bootstrap(
        samples, statistic, paired=True, n_resamples=RESAMPLES, confidence_level=1 - 2 * tail, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _no_spread(values: np.ndarray) -> bool:
    """Whether there are too few values, or too equal ones, for anything to be said about others."""
    return len(values) < FEWEST or np.ptp(values) <= 1e-12 * np.abs(values).max()


def estimate(values: np.ndarray) -> Estimate:
    """Mean of one value a document with its interval."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    return Estimate(mean, np.nan, np.nan) if _no_spread(values) else Estimate(mean, *interval((values,), np.mean))


def proportion(hits: np.ndarray) -> Estimate:
    """Share of ones among zeros and ones, with Wilson's interval: 0 of 32 are not certainly none."""
    hits = np.asarray(hits, dtype=float)
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(1 - LEVEL, "wilson")
    return Estimate(float(hits.mean()), float(found.low), float(found.high))


def difference(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """Mean difference of two methods on the same documents, one value a document, with its paired interval."""
    return estimate(np.asarray(values, dtype=float) - np.asarray(reference, dtype=float))


def differences(values: pd.Series, reference: pd.Series) -> np.ndarray:
    """`values - reference` of the documents that both have."""
    return (values - reference).dropna().to_numpy(dtype=float)


def paired(values: pd.Series, reference: pd.Series) -> Estimate:
    """Mean difference over the documents that both have, with its paired interval."""
    return estimate(differences(values, reference))


def p_value(values: np.ndarray, bound: float = 0.0) -> float:
    """Two-sided p of a bound being the mean of one value a document, by Student's t; NaN where nothing can be said."""
    values = np.asarray(values, dtype=float)
    return np.nan if _no_spread(values) else float(ttest_1samp(values, bound).pvalue)


def holm(p: Iterable[float]) -> np.ndarray:
    """p-values after Holm: the chance of any false finding among all of them is at most the level that each is held to.

    What could not be tested (NaN) counts as a test that found nothing.
    """
    p = np.nan_to_num(np.array(list(p), dtype=float), nan=1.0)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted


def equivalence(values: np.ndarray, margin: float) -> Equivalence:
    """Whether the mean of one difference a document lies within `margin` of 0."""
    values = np.asarray(values, dtype=float)
    if _no_spread(values):
        return Equivalence(margin, np.nan, np.nan, np.nan)
    above, below = (ttest_1samp(values, s * margin, alternative=a).pvalue for s, a in ((-1, "greater"), (1, "less")))
    low, high = ttest_1samp(values, 0.0).confidence_interval(1 - 2 * LEVEL)
    return Equivalence(margin, float(max(above, below)), float(low), float(high))


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


def kendall(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of `[..., methods]` along its last axis with `[methods]`, NaN where one of them is all ties."""
    one, other = np.triu_indices(len(theirs), 1)
    s = np.sign(ours[..., one] - ours[..., other])
    t = np.sign(theirs[one] - theirs[other])
    with np.errstate(invalid="ignore"):
        return (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum())


def order(values: list[np.ndarray], theirs: np.ndarray) -> Order:
    """Agreement of the order of our means with that of `theirs` `[methods]`.

    Parameters
    ----------
    values : list of np.ndarray, [documents]
        One value a document, of every method.
    """
    if len(values) < 2:
        return Order(Estimate(np.nan, np.nan, np.nan), np.nan, np.nan)
    means = np.array([v.mean() for v in values])
    tau = float(kendall(means, theirs))
    every = kendall(np.array(list(permutations(means))), theirs)
    same, reverse = (float(np.mean(sign * every >= sign * tau - 1e-9)) for sign in (1, -1))

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return kendall(np.stack([s.mean(axis=axis) for s in samples], axis=-1), theirs)

    bounds = (np.nan, np.nan)
    if len({len(v) for v in values}) == 1 and len(values[0]) >= FEWEST and np.isfinite(tau):
        bounds = interval(tuple(values), statistic)
        if np.isnan(bounds[0]):  # every resample has the same order
            bounds = (tau, tau)
    return Order(Estimate(tau, *bounds), same, reverse)


def aggregate(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Estimates of the document-level metrics in tidy `rows`: those without layer, turn and depth.

    What was right or wrong, question by question, is a proportion: its interval is the wider of Wilson's over questions
    and the bootstrap's over documents, whose questions share a cache.
    """
    groups = _whole(rows).groupby("metric", sort=True)
    found = {metric: estimate(group["value"].to_numpy(dtype=float)) for metric, group in groups}
    if "depth" in rows:
        for metric, group in rows[rows["depth"].notna()].groupby("metric"):
            hits = group["value"].to_numpy(dtype=float)
            if metric in found and np.isin(hits, (0, 1)).all():
                value, share = found[metric], proportion(hits)
                bounds = np.fmin(value.low, share.low), np.fmax(value.high, share.high)
                found[metric] = Estimate(value.mean, *map(float, bounds))
    return found


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
