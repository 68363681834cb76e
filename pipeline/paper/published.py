"""The published numbers and where they come from."""

import re
from functools import cache
from importlib.resources import files

import numpy as np
import yaml

from pipeline.paper.finished import FinishedRun
from pipeline.statistics import Order, order


@cache
def card() -> dict:
    """`source`, `tables` by table, method and column, and `findings`."""
    return yaml.safe_load(files("pipeline.paper").joinpath("published.yaml").read_text(encoding="utf-8"))


def references(methods: set[str]) -> list[str]:
    """What is cited, one line of Markdown a work: the sources of the methods, then those of the statistics."""
    cited = yaml.safe_load(files("pipeline.paper").joinpath("references.yaml").read_text(encoding="utf-8"))
    works = [one["work"] for one in cited if not one.get("methods") or methods & set(one["methods"])]
    linked = [re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", work) for work in works]
    return [re.sub(r"(?<!\()https?://[^\s)]*[^\s).,]", r"<\g<0>>", work) for work in linked]


def table(name: str) -> dict[str, dict[str, float]]:
    """The numbers of one published table by method and column."""
    return card()["tables"][name]


def agreement(runs: dict[str, FinishedRun], metric: str, name: str, column: str) -> Order:
    """How far our order of the methods that both have agrees with that of a column of a published table."""
    numbers = table(name)
    shared = [m for m in numbers if m in runs and column in numbers[m] and metric in runs[m].documents]
    values = [runs[m].documents[metric].dropna().to_numpy() for m in shared]
    return order(values, np.array([numbers[m][column] for m in shared], dtype=float))
