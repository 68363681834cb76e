"""Runs made up by hand: what a table or a verdict must say can be computed on paper."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from pipeline.paper.finished import FinishedRun
from pipeline.statistics import estimate
from tests.pipeline.paper.made_up import AOP, metrics_of, rows_of

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def record(as_json, folder):
    """Makes finished runs of the section `paper` of methods with a given AOP."""
    from pipeline.paper.sections import plan
    from pipeline.run import identity
    from pipeline.store import tracking

    def make(overrides: list[str], aop: dict[str, float]) -> None:
        (section,) = plan(["paper"], overrides, folder / "compositions.json")
        settings = section.jobs[0].settings
        mlflow = tracking.connect(settings.tracking, settings.outputs)
        for job in section.jobs:
            method = job.settings.method
            rows = rows_of(aop[method.name])
            tags = {
                tracking.CONFIGURATION: identity(job), "method": method.name, "title": method.title,
                "hash.document": job.document_hash, "git.revision": "abc",
                "platform": "a machine", "version.python": "3.11",
            }  # fmt: skip
            with mlflow.start_run(tags=tags):
                mlflow.log_metrics(metrics_of(rows))
                mlflow.log_text(as_json(rows), "rows.json")

    return make


@pytest.fixture(scope="module")
def store(small_in, record, folder) -> list[str]:
    """Overrides of a store in which every run of the section `paper` is finished."""
    overrides = [o for o in small_in(folder) if not o.startswith("document.count")]
    overrides += ["phase.drift.tokens=8", "phase.drift.positions=4"]
    record(overrides, AOP)
    return overrides


@pytest.fixture(scope="module")
def regenerated(store, folder) -> tuple[Path, str]:
    """The folder of the document, and what was printed."""
    from pipeline.paper.__main__ import main

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr("sys.argv", ["pipeline.paper", "--sections", "paper", *store])
        main()
    return folder / "outputs" / "paper", printed.getvalue()
