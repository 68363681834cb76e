"""A small model, short documents and an outputs folder of its own for every test."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.calibrate import calibrate
from pipeline.job import prepare
from pipeline.settings.compose import composed

SMALL = ["document.tokens=200", "document.continuation=64", "document.count=3", "budget.tokens=60", "budget.recent=16"]
PHASES = ["phase.memory.generated=8", "phase.perturbation.positions=8", "phase.perplexity.tokens=40"]
PHASES += ["tracking.figures=false"]  # of every run; the document draws its own


@pytest.fixture(scope="session")
def statistics(checkpoint, tmp_path_factory):
    """Query statistics of the small model, on other text than it is measured on."""
    folder = tmp_path_factory.mktemp("statistics")
    novel = ["document=book", "document.title=northanger_abbey"]  # all docstrings take seconds to collect
    overrides = [f"model.path={checkpoint}", f"outputs={folder}", *novel, *SMALL, *PHASES]
    return calibrate(overrides, folder / "statistics.safetensors")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store with its tables and no experiment: MLflow takes seconds to make one."""
    from pipeline.settings.config import TrackingConfig
    from pipeline.store import tracking

    folder = tmp_path_factory.mktemp("store")
    mlflow = tracking.connect(TrackingConfig(None, "Default"), folder)
    mlflow.end_run()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def outputs_in(empty_store) -> Callable[[Path], Path]:
    """Makes an outputs folder with a store in a folder."""

    def make(folder: Path) -> Path:
        (folder / "outputs").mkdir()
        with (
            closing(sqlite3.connect(empty_store)) as made,
            closing(sqlite3.connect(folder / "outputs" / "mlflow.db")) as own,
        ):
            made.backup(own)  # a copied file would miss what is still in the write-ahead log
        return folder / "outputs"

    return make


@pytest.fixture(scope="session")
def small_in(checkpoint, statistics, outputs_in) -> Callable[[Path], list[str]]:
    """Makes overrides that make any run quick and write to a folder."""
    model = ["model=qwen2_5_0_5b", f"model.path={checkpoint}", "model.bos=true", f"model.calibration={statistics}"]
    return lambda folder: [*model, f"outputs={outputs_in(folder)}", *SMALL, *PHASES]


@pytest.fixture
def small(small_in, tmp_path) -> list[str]:
    """Overrides that make any run quick and write to a temporary folder."""
    return small_in(tmp_path)


@pytest.fixture
def run(small):
    """Execute a configuration given by overrides on top of the small ones."""
    from pipeline.run import execute

    return lambda *overrides: execute(prepare(composed([*small, *overrides])))
