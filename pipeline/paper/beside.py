"""A published table beside ours: numbers, ranks, and how far the orders agree."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.paper import published
from pipeline.paper.agreement import agreement
from pipeline.paper.runs import Run
from pipeline.paper.table import Table, cell, flat, number
from pipeline.statistics import Estimate


@dataclass(frozen=True)
class Published:
    """A published table beside ours: the metric that ranks it, its published column, and further ones."""

    name: str
    title: str
    metric: str
    column: str
    label: str
    pattern: str
    higher: bool
    extra: tuple[tuple[str, str, str, str], ...]  # published column, our metric, label, pattern
    note: str


PUBLISHED = (
    Published(
        "compression", "Cache compression (full cache / cache; higher is better)", "memory/ratio", "ratio", "ratio",
        "{:.2f}", True, (("mb", "memory/mb", "MB", "{:.2f}"),),
        "Ours counts every byte that must live to continue decoding, the full cache in 16 bits. The published 7.1 MB "
        "are 576 tokens, 512 and 64 generated; its TurboQuant was simulated and saved nothing. MB depend on the model "
        "and are not comparable.",
    ),
    Published(
        "perturbation", "Attention output perturbation (AOP; lower is better)", "aop/mean", "mean", "AOP mean",
        "{:.3f}", False, (("max", "aop/max", "AOP max", "{:.2f}"),),
        "Relative L2 error of attention over the prefix, per layer, query head and continuation position; 0 is the "
        "full cache, 1 a zero vector. The published normalisation is not defined. The largest value is averaged over "
        "documents.",
    ),
    Published(
        "perplexity", "Perplexity (ND-PPL = (PPL - PPL_full) / PPL_full; lower is better)", "ppl/nd", "nd", "ND-PPL",
        "{:.3f}", False, (("comp", "ppl/comp", "PPL", "{:.2f}"),),
        "The published rows imply a full-cache perplexity of 1.006: a looped text, which measures copying.",
    ),
    Published(
        "drift", "Multi-turn drift (AOP of turn 5 - AOP of turn 1; lower is better)", "drift/aop_change", "change",
        "drift", "{:+.3f}", False,
        (("first", "drift/aop_first", "turn 1", "{:.3f}"), ("last", "drift/aop_last", "turn 5", "{:.3f}")),
        "Five turns of the true continuation, the cache brought back to its budget after each. The published turns use "
        "another AOP than its own table above (a mean of 4.50 where the largest value was 3.71).",
    ),
    Published(
        "throughput", "Decoding speed (against the full cache; higher is better)", "throughput/speedup", "speedup",
        "speed-up", "{:.2f}", True,
        (("tok_s", "throughput/tok_s", "tokens/s", "{:.1f}"), ("match", "match/tokens", "match, %", "{:.1f}")),
        "Median and quartiles of interleaved repeats on one document; every row has the full cache of its own run as "
        "baseline. Tokens match as a share of equal positions, which is chaotic after the first that differs. tokens/s "
        "depend on the machine and are not comparable.",
    ),
)  # fmt: skip

PERCENT = {"match/tokens": 100.0}


def beside(spec: Published, runs: dict[str, Run]) -> Table:
    """Our numbers beside the published ones, best first among the methods that both have, then the others.

    Parameters
    ----------
    runs : dict of str to Run
        By method.
    """
    numbers = published.table(spec.name)
    lines = []
    for method, run in runs.items():
        theirs = numbers.get(method, {})
        line = {"option": method, "method": run.title} | flat("ours", run.estimate(spec.metric))
        line["published"] = theirs.get(spec.column, np.nan)
        for column, metric, _, _ in spec.extra:
            value = run.estimate(metric)
            line[column] = np.nan if value is None else value.mean * PERCENT.get(metric, 1.0)
            line[f"{column}_published"] = theirs.get(column, np.nan)
        lines.append(line | {"run_id": run.run_id})
    table = pd.DataFrame(lines).set_index("option")
    shared = table["published"].notna() & table["ours"].notna()
    for column in ("ours", "published"):
        table[f"rank_{column}"] = table.loc[shared, column].rank(ascending=not spec.higher, method="min")
    table = (
        table.assign(unpublished=~shared)
        .sort_values(["unpublished", "ours"], ascending=[True, not spec.higher])
        .drop(columns="unpublished")
    )
    cells = {
        "method": table["method"],
        spec.label: table.apply(
            lambda r: cell(Estimate(r["ours"], r["ours_low"], r["ours_high"]), spec.pattern), axis=1
        ),
        "published": table["published"].map(lambda v: number(v, spec.pattern)),
        "rank": table["rank_ours"].map(lambda v: number(v, "{:.0f}")),
        "published rank": table["rank_published"].map(lambda v: number(v, "{:.0f}")),
    }
    for column, _, label, pattern in spec.extra:
        cells[label] = table[column].map(lambda v, p=pattern: number(v, p))
        cells[f"{label} published"] = table[f"{column}_published"].map(lambda v, p=pattern: number(v, p))
    tau = agreement(runs, spec.metric, spec.name, spec.column)
    verdict = f"Kendall's tau with the published order: {cell(tau, '{:+.2f}')}."
    title = spec.title
    return Table(f"published_{spec.name}", title, table.reset_index(), pd.DataFrame(cells), f"{verdict} {spec.note}")
