"""How far our order of the methods agrees with the published one."""

import numpy as np

from pipeline.paper import published
from pipeline.paper.runs import Run
from pipeline.statistics import FEWEST, Estimate, interval


def kendall(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of `[..., methods]` along its last axis with `[methods]`, NaN where one of them is all ties."""
    one, other = np.triu_indices(len(theirs), 1)
    s = np.sign(ours[..., one] - ours[..., other])
    t = np.sign(theirs[one] - theirs[other])
    with np.errstate(invalid="ignore"):
        return (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum())


def agreement(runs: dict[str, Run], metric: str, table: str, column: str) -> Estimate:
    """Kendall's tau between our and the published order of the methods that both have.

    Its interval is over documents; NaN with fewer than two methods.
    """
    numbers = published.table(table)
    shared = [m for m in numbers if m in runs and metric in runs[m].documents]
    if len(shared) < 2:
        return Estimate(np.nan, np.nan, np.nan)
    theirs = np.array([numbers[m][column] for m in shared], dtype=float)
    values = [runs[m].documents[metric].dropna().to_numpy() for m in shared]
    tau = float(kendall(np.array([v.mean() for v in values]), theirs))
    fewest = min(len(v) for v in values)
    if fewest < FEWEST or len({len(v) for v in values}) > 1 or np.isnan(tau):
        return Estimate(tau, np.nan, np.nan)

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return kendall(np.stack([s.mean(axis=axis) for s in samples], axis=-1), theirs)

    if all(np.ptp(v) == 0 for v in values):
        return Estimate(tau, tau, tau)
    return Estimate(tau, *interval(tuple(values), statistic))
