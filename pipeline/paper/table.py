"""A table: numbers with their intervals, as data and as they are printed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.paper.finished import FinishedRun
from pipeline.paper.latex import latex_text
from pipeline.show.summary import spread
from pipeline.statistics import LEVEL, Estimate, differences, estimate, holm, p_value

MISSING = "-"
STARRED = "* differs from 0 after Holm over all differences of the table."


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
    origins : list of dict of str to str, optional
        For every line the runs behind each printed column, ids separated by spaces; without it those of the line of
        `numbers`, where there are as many lines.
    """

    name: str
    title: str
    numbers: pd.DataFrame
    cells: pd.DataFrame
    note: str
    origins: list[dict[str, str]] | None = None

    def runs(self, line: int, column: str) -> list[str]:
        """Ids of the runs that a printed cell is from; a published number is from none."""
        if "published" in column:
            return []
        if self.origins is not None:
            return self.origins[line].get(column, "").split()
        if "run_id" not in self.numbers or len(self.numbers) != len(self.cells):
            return []
        return self.numbers["run_id"].iloc[line].split()

    def markdown(self) -> str:
        return self.cells.to_markdown(index=False, disable_numparse=True)

    def plain(self, width: int) -> str:
        """For a terminal: no column wider than `width`."""
        cells = self.cells.astype(str).map(lambda text: text.replace("**", ""))
        return cells.to_markdown(index=False, tablefmt="simple", disable_numparse=True, maxcolwidths=width)

    def _escaped(self) -> pd.DataFrame:
        return self.cells.astype(str).map(latex_text).rename(columns=latex_text)

    def latex(self) -> str:
        """A booktabs table with its title as caption."""
        label = f"tab:{self.name.replace('_', '-')}"
        return self._escaped().to_latex(index=False, escape=False, caption=latex_text(self.title), label=label)

    def tabular(self) -> str:
        """The same without a place and a caption."""
        return self._escaped().to_latex(index=False, escape=False)


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


def against(run: FinishedRun, reference: FinishedRun | None, metric: str) -> tuple[Estimate, float] | None:
    """Mean difference on the documents that have the metric in both runs, and its p; None where there is none."""
    if reference is None or reference is run or not all(metric in r.documents for r in (run, reference)):
        return None
    values = differences(run.documents[metric], reference.documents[metric])
    return estimate(values), p_value(values)


def starred(cells: list[dict[str, str]], p: dict[tuple[int, str], float]) -> None:
    """Mark the cells, by line and column, whose p after Holm over all of them is at most 5 %."""
    for (line, column), adjusted in zip(p, holm(p.values()), strict=True):
        if adjusted <= LEVEL:
            cells[line][column] += " *"


def listing(
    name: str, title: str, runs: list[FinishedRun], heads: dict[str, Callable[[FinishedRun], str]],
    columns: list[Column], note: str, reference: Callable[[FinishedRun], FinishedRun | None] = lambda run: None,
) -> Table:  # fmt: skip
    """A table with one line a run; differences that survive Holm over the table have a star.

    Parameters
    ----------
    heads : dict of str to function
        The columns that say what a line is about.
    reference : function
        The run that differences of a run are taken to; None, or the run itself: a dash.
    """
    numbers, cells, origins, p = [], [], [], {}
    for line, run in enumerate(runs):
        about = {label: head(run) for label, head in heads.items()}
        values, printed = dict(about), dict(about)
        origins.append(dict.fromkeys([*heads, *(column.label for column in columns)], run.run_id))
        for column in columns:
            if column.difference:
                found = against(run, reference(run), column.metric)
                value, key = None if found is None else found[0], f"{column.metric}_difference"
                if found is not None:
                    p[line, column.label] = values[f"{key}_p"] = found[1]
                    origins[line][column.label] += f" {reference(run).run_id}"
            else:
                value, key = run.estimate(column.metric), column.metric
            values |= flat(key, value)
            printed[column.label] = cell(value, column.pattern)
        numbers.append(values | {"run_id": run.run_id})
        cells.append(printed)
    starred(cells, p)
    note = f"{note} {STARRED}" if p else note
    return Table(name, title, pd.DataFrame(numbers), pd.DataFrame(cells), note, origins)


def grid(name: str, title: str, runs: list[FinishedRun], across: str, metric: str, pattern: str, note: str) -> Table:
    """A table with one line a method and one column a value of the setting `across`."""
    numbers, cells, origins = [], [], []
    for method in dict.fromkeys(run.method for run in runs):
        own = {run.choice[across]: run for run in runs if run.method == method}
        origins.append({setting: run.run_id for setting, run in own.items()})
        printed = {"method": next(iter(own.values())).title}
        for setting, run in own.items():
            printed[setting] = cell(run.estimate(metric), pattern)
            line = {"method": run.title, across: setting, **flat(metric, run.estimate(metric)), "run_id": run.run_id}
            numbers.append(line)
        cells.append(printed)
    return Table(name, title, pd.DataFrame(numbers), pd.DataFrame(cells).fillna(MISSING), note, origins)
