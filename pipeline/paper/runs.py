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
class Run:
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
    """

    run_id: str
    choice: dict[str, str]
    count: int
    metrics: dict[str, float]
    tags: dict[str, str]
    read_rows: Callable[[], str] = field(repr=False)

    @property
    def method(self) -> str:
        return self.tags["method"]

    @property
    def title(self) -> str:
        return self.tags["title"]

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Tidy rows, every coordinate and the value a number, NaN where a coordinate does not apply."""
        table = json.loads(self.read_rows())
        frame = pd.DataFrame(table["data"], columns=table["columns"]).reindex(columns=[*COORDINATES, "metric"])
        return frame.assign(**{name: pd.to_numeric(frame[name]) for name in COORDINATES})

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row a document, one column a metric, with what follows from the recorded ones."""
        found = per_document(self.rows)
        if "memory/ratio" in found:
            found["memory/saved"] = 1 - 1 / found["memory/ratio"]
        if "drift/aop_last" in found:
            found["drift/aop_change"] = found["drift/aop_last"] - found["drift/aop_first"]
        return found

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over documents with its interval, or of timed repeats their median and quartiles; None: not measured."""
        if f"{metric}_q25" in self.metrics:
            return Estimate(self.metrics[metric], self.metrics[f"{metric}_q25"], self.metrics[f"{metric}_q75"])
        if metric in self.metrics:
            bounds = (self.metrics.get(f"{metric}_{bound}", np.nan) for bound in ("low", "high"))
            return Estimate(self.metrics[metric], *bounds)
        if metric in self.documents:
            return estimate(self.documents[metric].dropna().to_numpy())
        return None
