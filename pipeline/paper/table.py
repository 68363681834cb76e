"""A table: numbers with their intervals, as data and as they are printed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.paper.runs import Run
from pipeline.show.summary import spread
from pipeline.statistics import Estimate, difference

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """A finished table.

    Parameters
    ----------
    name : str
        Stem of its files.
    numbers : pd.DataFrame
        Every number and the run it is from, one row a line.
    cells : pd.DataFrame
        What is printed.
    """

    name: str
    title: str
    numbers: pd.DataFrame
    cells: pd.DataFrame
    note: str

    def markdown(self) -> str:
        return self.cells.to_markdown(index=False, disable_numparse=True)

    def latex(self) -> str:
        """A booktabs table with its title as caption."""
        return self.cells.to_latex(
            index=False, escape=True, caption=self.title.replace("%", r"\%"), label=f"tab:{self.name}"
        )


@dataclass(frozen=True)
class Column:
    """A metric of a table: what it is called and how it is printed. `difference`: against the reference run, paired."""

    metric: str
    label: str
    pattern: str = "{:.3f}"
    difference: bool = False


def number(value: float | None, pattern: str) -> str:
    """The number as printed, or a dash where there is none."""
    return MISSING if value is None or pd.isna(value) else pattern.format(value)


def cell(value: Estimate | None, pattern: str) -> str:
    """The number with its interval, or a dash where there is none."""
    return MISSING if value is None or pd.isna(value.mean) else spread(value, pattern)


def flat(name: str, value: Estimate | None) -> dict[str, float]:
    """The number and its bounds as columns of a CSV file."""
    value = value or Estimate(np.nan, np.nan, np.nan)
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def paired(run: Run, reference: Run, metric: str) -> Estimate | None:
    """Mean difference on the documents that have the metric in both runs."""
    if metric not in run.documents or metric not in reference.documents:
        return None
    both = pd.concat([run.documents[metric], reference.documents[metric]], axis=1).dropna().to_numpy()
    return difference(both[:, 0], both[:, 1])


def listing(
    name: str, title: str, runs: list[Run], heads: dict[str, Callable[[Run], str]], columns: list[Column], note: str,
    reference: Callable[[Run], Run | None] = lambda run: None,
) -> Table:  # fmt: skip
    """A table with one line a run.

    Parameters
    ----------
    heads : dict of str to function
        The columns that say what a line is about.
    reference : function
        The run that differences of a run are taken to; None, or the run itself: a dash.
    """
    numbers, cells = [], []
    for run in runs:
        line = {label: head(run) for label, head in heads.items()}
        values, printed = dict(line), dict(line)
        for column in columns:
            if column.difference:
                other = reference(run)
                value = None if other is None or other is run else paired(run, other, column.metric)
                key = f"{column.metric}_difference"
            else:
                value, key = run.estimate(column.metric), column.metric
            values |= flat(key, value)
            printed[column.label] = cell(value, column.pattern)
        numbers.append(values | {"run_id": run.run_id})
        cells.append(printed)
    return Table(name, title, pd.DataFrame(numbers), pd.DataFrame(cells), note)


def grid(name: str, title: str, runs: list[Run], across: str, metric: str, pattern: str, note: str) -> Table:
    """A table with one line a method and one column a value of the setting `across`."""
    numbers, cells = [], []
    for method in dict.fromkeys(run.method for run in runs):
        own = {run.choice[across]: run for run in runs if run.method == method}
        printed = {"method": next(iter(own.values())).title}
        for setting, run in own.items():
            printed[setting] = cell(run.estimate(metric), pattern)
            line = {"method": run.title, across: setting, **flat(metric, run.estimate(metric)), "run_id": run.run_id}
            numbers.append(line)
        cells.append(printed)
    return Table(name, title, pd.DataFrame(numbers), pd.DataFrame(cells).fillna(MISSING), note)
