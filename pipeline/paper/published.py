"""The published numbers and where they come from."""

from functools import cache
from importlib.resources import files

import yaml


@cache
def card() -> dict:
    """`source`, `tables` by table, method and column, and `findings`."""
    return yaml.safe_load(files("pipeline.paper").joinpath("published.yaml").read_text(encoding="utf-8"))


def table(name: str) -> dict[str, dict[str, float]]:
    """The numbers of one published table by method and column."""
    return card()["tables"][name]
