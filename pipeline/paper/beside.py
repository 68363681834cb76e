"""A published table beside ours: numbers, and how far the orders agree."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.paper import published
from pipeline.paper.finished import FinishedRun
from pipeline.paper.recency import OUTSIDE, RECENCY
from pipeline.paper.table import STARRED, Table, against, cell, flat, number, starred
from pipeline.statistics import Estimate


@dataclass(frozen=True)
class Published:
    """A published table beside ours.

    Parameters
    ----------
    metric, column : str
        Our metric, and the published column that it stands beside.
    extra : tuple of (published column, our metric, label, pattern)
        Further columns.
    ordered : bool
        Whether the published order says more than one binary split, so that agreement with it can be tested.
    recency : bool
        Whether there is a column of differences to StreamingLLM.
    """

    name: str
    title: str
    metric: str
    column: str
    label: str
    pattern: str
    higher: bool
    extra: tuple[tuple[str, str, str, str], ...]
    ordered: bool
    recency: bool
    note: str


PUBLISHED = (
    Published(
        "compression", "Cache compression (full cache / cache; higher is better)", "memory/ratio", "ratio", "ratio",
        "{:.2f}", True, (("mb", "memory/mb", "MB", "{:.2f}"),), False, False,
        "Counted, not sampled: every byte that must live to continue decoding, the full cache in 16 bits. The "
        "published 7.1 MB are 576 tokens, 512 and 64 generated; its TurboQuant was simulated and saved nothing. "
        "MB depend on the model and are not comparable.",
    ),
    Published(
        "perturbation", "Attention output perturbation (AOP; lower is better)", "aop/mean", "mean", "AOP mean",
        "{:.3f}", False, (("max", "aop/max", "AOP max", "{:.2f}"),), True, True,
        "Relative L2 error of attention over the prefix, per layer, query head and continuation position; 0 is the "
        "full cache, 1 a zero vector. The published normalisation is not defined. The largest value is averaged over "
        "windows.",
    ),
    Published(
        "perplexity", "Perplexity (ND-PPL = (PPL - PPL_full) / PPL_full; lower is better)", "ppl/nd", "nd", "ND-PPL",
        "{:.3f}", False, (("comp", "ppl/comp", "PPL", "{:.2f}"),), True, True,
        "ND-PPL is a mean over windows of each window's ratio; the ratio of the mean perplexities beside it is another "
        "number. The published rows imply a full-cache perplexity of 1.006: a looped text, which measures copying.",
    ),
    Published(
        "drift", "Multi-turn drift (change of AOP from turn 1 to turn 5; lower is better)", "drift/aop_line", "change",
        "along the line", "{:+.3f}", False,
        (("first", "drift/aop_first", "turn 1", "{:.3f}"), ("last", "drift/aop_last", "turn 5", "{:.3f}")), True, False,
        "Change along the least-squares line through five turns of the true continuation (four times the slope, which "
        "decides), the cache brought back to its budget after each; published is turn 5 - turn 1. Appended tokens are "
        "exact and take attention, so that AOP falls where it was high: Random shows how much of a fall means nothing. "
        "The published turns use another AOP than its own table above (a mean of 4.50 where the largest was 3.71).",
    ),
    Published(
        "match", "Token match (share of greedy tokens equal to the full cache's, in %)", "match/percent", "match",
        "match, %", "{:.1f}", True,
        (("prefix", "match/prefix", "prefix, tokens", "{:.0f}"), ("kl", "ppl/kl", "KL, nats", "{:.3f}")), True, False,
        "128 tokens of each of five windows. After the first that differs, equal positions are chance; the prefix is "
        "what comes before it. KL, over all windows, says more.",
    ),
)  # fmt: skip


def beside(spec: Published, runs: dict[str, FinishedRun]) -> Table:
    """Our numbers beside the published ones, best first among the methods that both have, then the others.

    Parameters
    ----------
    runs : dict of str to FinishedRun
        By method.
    """
    numbers = published.table("throughput" if spec.name == "match" else spec.name)
    lines, p = [], {}
    for method, run in runs.items():
        theirs = numbers.get(method, {})
        line = {"option": method, "method": run.title} | flat("ours", run.estimate(spec.metric))
        line["published"] = theirs.get(spec.column, np.nan)
        if spec.recency:
            found = None if method == "full" else against(run, runs.get(RECENCY), spec.metric)
            line |= flat("recency_difference", found and found[0])
            line["recency_difference_p"] = np.nan if found is None else found[1]
        for column, metric, _, _ in spec.extra:
            value = run.estimate(metric)
            line[column] = np.nan if value is None else value.mean
            line[f"{column}_published"] = theirs.get(column, np.nan)
        lines.append(line | {"run_id": run.run_id})
    table = pd.DataFrame(lines)
    table = (
        table.assign(unpublished=table["published"].isna() | table["ours"].isna())
        .sort_values(["unpublished", "ours"], ascending=[True, not spec.higher], kind="stable")
        .drop(columns="unpublished")
        .reset_index(drop=True)
    )
    cells: list[dict[str, str]] = []
    origins: list[dict[str, str]] = []
    recency = f"- {runs[RECENCY].title}" if RECENCY in runs else ""
    for index, row in table.iterrows():
        own = {
            "method": row["method"],
            spec.label: cell(Estimate(row["ours"], row["ours_low"], row["ours_high"]), spec.pattern),
            "published": number(row["published"], spec.pattern),
        }
        if spec.recency and recency:
            bounds = (row[f"recency_difference{bound}"] for bound in ("", "_low", "_high"))
            own[recency] = cell(Estimate(*bounds), "{:+.3f}")
            if not np.isnan(row["recency_difference_p"]):
                p[index, recency] = row["recency_difference_p"]
        for column, _, label, pattern in spec.extra:
            own[label] = number(row[column], pattern)
            if table[f"{column}_published"].notna().any():
                own[f"{label} published"] = number(row[f"{column}_published"], pattern)
        cells.append(own)
        origins.append(dict.fromkeys(own, row["run_id"]))
        if recency in own:
            origins[-1][recency] += f" {runs[RECENCY].run_id}"
    starred(cells, p)
    note = _note(spec, runs, bool(p))
    return Table(f"published_{spec.name}", spec.title, table, pd.DataFrame(cells), note, origins)


def _note(spec: Published, runs: dict[str, FinishedRun], differs: bool) -> str:
    parts = []
    if spec.ordered:
        name = "throughput" if spec.name == "match" else spec.name
        found = published.agreement(runs, spec.metric, name, spec.column)
        if not np.isnan(found.tau.mean):
            parts.append(
                f"Kendall's tau with the published order: {cell(found.tau, '{:+.2f}')}; a share of {found.same:.3f} of "
                "all orders agree as well (one-sided permutation test)."
            )
    if spec.name == "match" and "full" in runs:
        floor = runs["full"].estimate("match/noise_floor_tokens")
        if floor is not None:
            parts.append(
                f"Noise floor, the full cache beside itself in another attention kernel: {100 * floor.mean:.1f} %."
            )
    parts.append(spec.note)
    if differs:
        beyond = [runs[m].title for m in OUTSIDE if m in runs and m not in ("full", RECENCY)]
        spent = f"; {beyond[0]} spends more bytes" if beyond else ""
        parts.append(f"Differences to StreamingLLM, the latest tokens, are paired{spent}. {STARRED}")
    return " ".join(parts)
