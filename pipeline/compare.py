"""Differences between configurations on the same documents, with paired intervals.

    python -m pipeline.compare method=tri,streaming,snapkv document.count=16 --against method=random
    python -m pipeline.compare method=tri storage=turboquant_4bit budget.ratio=0.125 --against method=tri

The first settings are swept as by `python -m pipeline ... -m`; each run is compared with the one configuration after
`--against` (settings of the model, the documents, the phases, the outputs and the tracking are taken over from the
first). What is missing is measured. Differences are means over documents of (run - reference), with a 95 % bootstrap
interval over documents; they are added to each run in MLflow as `<metric>_vs_<reference>`. A star marks those that
differ from 0 after Holm over the table, an equals sign those that two one-sided tests put within the margin that is
printed (pipeline/paper/margins.yaml). `--gap` also reports the
share of the gap between random tokens and the oracle (`method=oracle_value`) that a run closes, as `<metric>_gap`.

    python -m pipeline.compare --runs method=tri,snapkv budget=512
    python -m pipeline.compare --runs table=paper --metrics aop/mean memory/mb

With `--runs` nothing is measured: finished runs of the store whose settings fit are printed side by side.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.job import prepare
from pipeline.paper.recency import margins
from pipeline.run import Result, execute
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed, spelled_out, sweep
from pipeline.settings.errors import InputError
from pipeline.show.summary import LABELS, spread
from pipeline.statistics import (
    LEVEL,
    Equivalence,
    Estimate,
    differences,
    equivalence,
    gap_closed,
    holm,
    p_value,
    paired,
    per_document,
)
from pipeline.store import search

SHARED = (
    "hydra",
    "model",
    "document",
    "phase",
    "backend",
    "outputs",
    "tracking",
    "prefill_memory_gb",
    "prefill_cache_gb",
    "prefill_cache_least_s",
    "checkpoints",
    "seed",
)
COMPARED = ("aop/mean", "mass/mean", "ppl/nd", "ppl/delta_nll_context", "ppl/kl", "ppl/top1")
GAPS = ("aop/mean", "ppl/delta_nll", "ppl/kl")


def documents(result: Result) -> pd.DataFrame:
    """The run's values, one row a document and one column a metric, as MLflow holds them."""
    import mlflow

    try:
        rows = mlflow.load_table("rows.json", run_ids=[result.run_id])
    except (mlflow.MlflowException, OSError):
        raise InputError(
            f"run {result.run_id} has lost its rows.json: call python -m pipeline.doctor, then it is measured again"
        ) from None
    numbers = {column: pd.to_numeric(rows[column]) for column in ("layer", "turn", "value")}
    return per_document(rows.assign(**numbers))


def compared(
    tables: list[pd.DataFrame], metrics: tuple[str, ...], statistic: Callable[[pd.DataFrame, str], Estimate]
) -> list[dict[str, Estimate]]:
    """For every run the statistic of each metric that it has."""
    return [{m: statistic(table, m) for m in metrics if m in table} for table in tables]


def log(result: Result, estimates: dict[str, Estimate], suffix: str) -> None:
    """Add estimates to a finished run as `<metric>_<suffix>`, with their bounds."""
    import mlflow

    values = {}
    for metric, value in estimates.items():
        bounds = {"": value.mean, "_low": value.low, "_high": value.high}
        values |= {f"{metric}_{suffix}{bound}": v for bound, v in bounds.items() if np.isfinite(v)}
    mlflow.log_metrics(values, run_id=result.run_id)


@dataclass(frozen=True)
class Tested:
    """What the tests of a difference say: its p after Holm over the table, and whether it is within a margin."""

    p: float
    equivalence: Equivalence | None

    @property
    def mark(self) -> str:
        if self.p <= LEVEL:
            return " *"
        return " =" if self.equivalence is not None and self.equivalence.holds else ""


def assessed(tables: list[pd.DataFrame], reference: pd.DataFrame) -> list[dict[str, Tested]]:
    """Tests of the differences of every run and metric: Holm over all of them, and equality where a margin is known."""
    values = [{m: differences(table[m], reference[m]) for m in COMPARED if m in table} for table in tables]
    places = [(line, metric) for line, own in enumerate(values) for metric in own]
    adjusted = holm(p_value(values[line][metric]) for line, metric in places)
    found: list[dict[str, Tested]] = [{} for _ in tables]
    for (line, metric), p in zip(places, adjusted, strict=True):
        margin = margins().get(metric)
        equal = None if margin is None else equivalence(values[line][metric], margin["margin"])
        found[line][metric] = Tested(float(p), equal)
    return found


def explained(tests: list[dict[str, Tested]]) -> str:
    """What the marks of a table mean, with the margins that were applied."""
    metrics = list(dict.fromkeys(m for own in tests for m, test in own.items() if test.equivalence is not None))
    stated = ", ".join(f"{margins()[m]['label']} {margins()[m]['margin']:g}" for m in metrics)
    count = sum(map(len, tests))
    return (
        f"* differs from 0 at 5 % after Holm over these {count} tests; = does not, and lies within the margin "
        f"({stated}) by two one-sided tests at 5 %; no mark: undecided."
    )


def show(
    title: str,
    results: list[Result],
    estimates: list[dict[str, Estimate]],
    tests: list[dict[str, Tested]] | None = None,
) -> None:
    """One row a run, one column a metric."""
    metrics = [m for m in LABELS if any(m in e for e in estimates)]
    metrics += sorted({m for e in estimates for m in e} - set(metrics))
    table = Table(title=title, title_justify="left", title_style="bold")
    further = ("allocation", "refit", "backend")
    names = ["method", "tokens", "storage"] + [n for n in further if len({getattr(r, n) for r in results}) > 1]
    for name in (*names, *metrics):
        table.add_column(name, justify="left" if name in ("method", "storage", *further) else "right")
    marks = [{m: test.mark for m, test in own.items()} for own in tests or [{}] * len(results)]
    for result, row, mark in zip(results, estimates, marks, strict=True):
        cells = [spread(row[m], "{:+.3f}") + mark.get(m, "") if m in row else "-" for m in metrics]
        about = [result.title, str(result.budget or "all"), result.storage, *(getattr(result, n) for n in names[3:])]
        table.add_row(*about, *cells)
    Console(highlight=False, width=200 if not sys.stdout.isatty() else None).print(table)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def compare(overrides: list[str], against: list[str], gap: bool) -> None:
    """Measure what is missing, print the differences and add them to the runs."""
    overrides = spelled_out(overrides)
    own = {_key(o) for o in against}
    shared = [
        o for o in overrides if (group := _key(o).partition(".")[0]) in SHARED and own.isdisjoint((group, _key(o)))
    ]
    jobs = [prepare(composed(job)) for job in sweep(None, overrides)]
    if len({job.document_hash for job in jobs}) > 1:
        raise InputError("only runs on the same documents can be compared: give one value for document settings")
    if swept := [o for o in shared if len(sweep(None, [o])) > 1]:
        raise InputError(f"{swept[0]} has several values: say after --against which one to compare with")
    reference = prepare(composed([*shared, *against]))
    if reference.document_hash != jobs[0].document_hash:
        raise InputError("--against names other documents: only runs on the same documents can be compared")
    results = [execute(job) for job in jobs]
    tables = [documents(result) for result in results]
    base = execute(reference)
    values = documents(base)
    name = "-".join([reference.settings.method.name, str(base.budget or "all"), base.storage, *base.further])
    found = compared(tables, COMPARED, lambda table, m: paired(table[m], values[m]))
    tests = assessed(tables, values)
    place = f" on {base.backend}" if any(result.backend != base.backend for result in results) else ""
    show(f"difference to {name}{place}: mean over documents [95 % interval, paired]", results, found, tests)
    print(explained(tests))
    for result, estimates in zip(results, found, strict=True):
        log(result, estimates, f"vs_{name}")
    if gap:
        oracle = ["method=oracle_value"]
        seen, there = composed([*shared, *oracle]).method.horizon, reference.settings.documents.continuation
        if there < seen:  # the oracle looks at all of a short continuation
            oracle.append(f"method.horizon={there}")
        ends = [
            documents(execute(prepare(composed([*shared, *against, *method]))))
            for method in (["method=random"], oracle)
        ]
        gaps = compared(tables, GAPS, lambda t, m: gap_closed(t[m].to_numpy(), *(end[m].to_numpy() for end in ends)))
        show("share of the gap from random tokens to the oracle that is closed", results, gaps)
        for result, estimates in zip(results, gaps, strict=True):
            log(result, estimates, "gap")
    print(f"{results[0].documents}\nAdded to {len(results)} runs in {results[0].store}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline, swept over commas")
    parser.add_argument("--against", nargs="+", metavar="SETTING", help="the reference configuration")
    parser.add_argument("--runs", action="store_true", help="print finished runs that fit the settings")
    parser.add_argument("--metrics", nargs="+", default=[], help="metrics that --runs prints")
    parser.add_argument("--gap", action="store_true", help="also the share of the gap from random to oracle")
    arguments = parser.parse_intermixed_args()
    if arguments.runs == bool(arguments.against):
        parser.error("give either --against <the reference configuration> or --runs")
    with reporting(sys.argv[1:]):
        if arguments.runs:
            search.show(arguments.overrides, arguments.metrics)
            return
        compare(arguments.overrides, arguments.against, arguments.gap)


if __name__ == "__main__":
    main()
