"""Runs made up by hand: what a table or a verdict must say can be computed on paper."""

import json

import numpy as np
import pytest

from pipeline.paper.finished import FinishedRun
from pipeline.statistics import estimate

TITLES = {
    "wavelet": "WaveletKV",
    "wavelet_tri": "WaveletTriAttn",
    "wavelet_fourier": "WaveletFourierKV",
    "fourier": "FourierKV",
    "tri": "TriAttentionKV",
    "turboquant": "TurboQuant-4bit",
    "streaming": "StreamingLLM",
}


@pytest.fixture(scope="session")
def as_json():
    """Writes tidy rows as MLflow's tables are."""
    return _as_json


def _as_json(rows: list[dict]) -> str:
    columns = ["document", "layer", "head", "turn", "depth", "position", "frequency", "metric", "value"]
    return json.dumps({"columns": columns, "data": [[row.get(c) for c in columns] for row in rows]})


@pytest.fixture
def made():
    """Makes a run of a method from its values by metric, one a document."""

    def make(
        method: str, values: dict[str, list[float]], choice: dict | None = None, rows: list | None = None, **metrics
    ):
        table = [
            {"document": d, "metric": metric, "value": value}
            for metric, own in values.items()
            for d, value in enumerate(own)
        ]
        recorded = dict(metrics)
        for metric, own in values.items():
            found = estimate(np.array(own))
            bounds = {f"{metric}_low": found.low, f"{metric}_high": found.high}
            recorded |= {metric: found.mean, **{k: v for k, v in bounds.items() if np.isfinite(v)}}
        tags = {
            "method": method,
            "title": TITLES.get(method, method),
            "identity": f"identity of {method}",
            "hash.document": "d",
        }
        count = max((len(own) for own in values.values()), default=0)
        return FinishedRun(
            f"run-{method}", choice or {"method": method}, count, recorded, tags, lambda: _as_json(table + (rows or []))
        )  # fmt: skip

    return make
