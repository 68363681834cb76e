"""Tables that put our number, the published number and both ranks side by side."""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd
import yaml
from scipy.stats import kendalltau


@dataclass(frozen=True)
class TableSpec:
    """One published table: the metric that ranks it, and the metric printed beside it.

    Parameters
    ----------
    name : str
        Section of `published.yaml`, and the stem of the CSV file.
    metric, published : str
        Our metric and the published column that it reproduces.
    extra : dict of str to str
        Further published columns and the metrics that go with them.
    best : str
        `low` or `high`.
    """

    name: str
    title: str
    metric: str
    published: str
    label: str
    best: str
    digits: int
    extra: dict[str, tuple[str, str]]
    note: str


TABLES = (
    TableSpec(
        "memory", "Cache compression (full cache / cache; higher is better)",
        "memory/ratio", "ratio", "ratio", "high", 2,
        {"mb": ("memory/mb", "MB")},
        "Ours counts every byte that must live to continue decoding, the full cache in 16 bits. "
        "The published 7.1 MB are 576 tokens (512 and 64 generated); its TurboQuant was simulated and saved nothing. "
        "MB depend on the model and are not comparable.",
    ),
    TableSpec(
        "perturbation", "Attention output perturbation (AOP; lower is better)",
        "aop/mean", "mean", "AOP mean", "low", 3,
        {"max": ("aop/max", "AOP max")},
        "Relative L2 error of attention over the prefix, per layer, query head and continuation position; "
        "0 is the full cache, 1 a zero vector. "
        "The published normalisation is not defined. The largest value is averaged over documents.",
    ),
    TableSpec(
        "perplexity", "Perplexity (ND-PPL = (PPL - PPL_full) / PPL_full; lower is better)",
        "ppl/nd", "nd", "ND-PPL", "low", 3,
        {"comp": ("ppl/comp", "PPL")},
        "The published rows imply a full-cache perplexity of 1.006: a looped text, which measures copying.",
    ),
)  # fmt: skip


def published() -> dict[str, dict[str, dict[str, float]]]:
    """The published numbers by table, method and column."""
    return yaml.safe_load(files("pipeline.paper").joinpath("published.yaml").read_text())


def build(spec: TableSpec, runs: pd.DataFrame, numbers: dict) -> pd.DataFrame:
    """One row a method, best first among the published six, then the runs without a published counterpart.

    Parameters
    ----------
    runs : pd.DataFrame
        One row a finished run, as `mlflow.search_runs` gives it, indexed by method.
    numbers : dict
        This table's section of `published.yaml`.
    """
    metric = f"metrics.{spec.metric}"
    table = pd.DataFrame({"method": runs["tags.title"]})
    table["ours"] = runs.get(metric, np.nan)
    for bound in ("low", "high"):
        table[bound] = runs.get(f"{metric}_{bound}", np.nan)
    table["published"] = pd.Series({m: row[spec.published] for m, row in numbers.items()}, dtype=float)
    ascending = spec.best == "low"
    shared = table["published"].notna() & table["ours"].notna()
    for column in ("ours", "published"):
        table[f"rank_{column}"] = table.loc[shared, column].rank(ascending=ascending, method="min")
    for column, (extra, _) in spec.extra.items():
        table[column] = runs.get(f"metrics.{extra}", np.nan)
        table[f"{column}_published"] = pd.Series({m: row.get(column) for m, row in numbers.items()}, dtype=float)
    table["run_id"] = runs["run_id"]
    return (
        table.assign(unpublished=~shared)
        .sort_values(["unpublished", "ours"], ascending=[True, ascending])
        .drop(columns="unpublished")
    )


def agreement(table: pd.DataFrame) -> float:
    """Kendall's tau-b between our and the published order of the methods both have; NaN with fewer than two."""
    both = table.dropna(subset=["rank_ours", "rank_published"])
    return float(kendalltau(both["rank_ours"], both["rank_published"]).statistic) if len(both) > 1 else float("nan")


def render(spec: TableSpec, table: pd.DataFrame) -> str:
    """The table as Markdown, `-` where a number is missing."""

    def number(value: float, digits: int) -> str:
        return "-" if pd.isna(value) else f"{value:.{digits}f}"

    def interval(row: pd.Series) -> str:
        mean = number(row["ours"], spec.digits)
        return (
            f"{mean} [{number(row['low'], spec.digits)}, {number(row['high'], spec.digits)}]"
            if row["low"] < row["high"]
            else mean
        )

    columns = {
        "method": table["method"],
        spec.label: table.apply(interval, axis=1),
        "published": table["published"].map(lambda v: number(v, spec.digits)),
        "rank": table["rank_ours"].map(lambda v: number(v, 0)),
        "published rank": table["rank_published"].map(lambda v: number(v, 0)),
    }
    for column, (_, label) in spec.extra.items():
        columns[label] = table[column].map(lambda v: number(v, 2))
        columns[f"{label} published"] = table[f"{column}_published"].map(lambda v: number(v, 2))
    tau = agreement(table)
    verdict = f"Kendall's tau with the published order of these methods: {'-' if np.isnan(tau) else f'{tau:+.2f}'}."
    body = pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)
    return f"## {spec.title}\n\n{body}\n\n{verdict} {spec.note}\n"
