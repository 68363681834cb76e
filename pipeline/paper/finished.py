"""Finished runs as the document reads them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from pipeline.statistics import Estimate, estimate, per_document

COORDINATES = ["document", "layer", "head", "turn", "depth", "position", "frequency", "value"]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of MLflow.

    Parameters
    ----------
    choice : dict of str to str
        What its section varied: the settings that tell it from the others, as `method: tri`.
    count : int
        Documents that were measured.
    metrics : dict of str to float
        Means over documents, with bounds as `<metric>_low` and `<metric>_high`.
    tags : dict of str to str
        Hashes, versions, revision, and the `title` of the method.
    read_rows : function
        Gives the JSON text of the tidy rows; called once, if somebody asks.
    started : int
        When, in milliseconds since 1970.
    """

    run_id: str
    choice: dict[str, str]
    count: int
    metrics: dict[str, float]
    tags: dict[str, str]
    read_rows: Callable[[], str] = field(repr=False)
    started: int = 0

    @property
    def method(self) -> str:
        return self.tags["method"]

    @property
    def title(self) -> str:
        return self.tags["title"]

    @property
    def name(self) -> str:
        """The title, and which variant of the method it is."""
        variant = self.choice.get("variant", "").removeprefix(f"{self.method}_").replace("_", " ")
        return self.title if variant in ("", "default") else f"{self.title} ({variant})"

    @cached_property
    def text(self) -> str:
        """The tidy rows as JSON."""
        return self.read_rows()

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Tidy rows, every coordinate and the value a number, NaN where a coordinate does not apply."""
        table = json.loads(self.text)
        frame = pd.DataFrame(table["data"], columns=table["columns"]).reindex(columns=[*COORDINATES, "metric"])
        return frame.assign(**{name: pd.to_numeric(frame[name]) for name in COORDINATES})

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row a document, one column a metric, with what follows from the recorded ones."""
        found = per_document(self.rows)
        if "memory/ratio" in found:
            found["memory/saved"] = 1 - 1 / found["memory/ratio"]
        if "match/tokens" in found:
            found["match/percent"] = 100 * found["match/tokens"]
        if "drift/aop_slope" in found:
            # change along the least-squares line from the first turn to the last, in the unit of last - first
            turns = self.rows.loc[self.rows["metric"] == "drift/aop", "turn"].max()
            found["drift/aop_line"] = found["drift/aop_slope"] * (turns - 1)
        return found

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over documents with its interval; None: not measured."""
        if metric in self.metrics:
            bounds = (self.metrics.get(f"{metric}_{bound}", np.nan) for bound in ("low", "high"))
            return Estimate(self.metrics[metric], *bounds)
        if metric in self.documents:
            return estimate(self.documents[metric].dropna().to_numpy())
        return None
