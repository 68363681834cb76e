"""What the store holds, read in time: the same by whichever process, and never before there is one."""

import os

import pytest

from pipeline.paper.stored import Stored, ahead, finished
from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError
from pipeline.store import tracking

SETTINGS = TrackingConfig(None, "spectral-kv")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A store with two finished runs of one identity, one of another, and runs that count for nothing."""
    folder = tmp_path_factory.mktemp("stored") / "with a space, ü and 50%"
    folder.mkdir()
    mlflow = tracking.connect(SETTINGS, folder)
    for number, (identity, status) in enumerate(
        [("a", "FINISHED"), ("a", "FINISHED"), ("b", "FINISHED"), ("c", "FAILED"), ("b", "KILLED"), (None, "FINISHED")]
    ):
        with mlflow.start_run(tags={"identity": identity} if identity else {}) as run:
            mlflow.log_metric("aop/mean", number)
            mlflow.log_text(f"rows of {number}", "rows.json")
        mlflow.MlflowClient().set_terminated(run.info.run_id, status)
    return folder


def test_the_newest_finished_run_of_every_identity(outputs):
    found = finished(SETTINGS, outputs)
    assert {name: run.metrics for name, run in found.items()} == {"a": {"aop/mean": 1}, "b": {"aop/mean": 2}}
    assert found["a"].tags["identity"] == "a" and found["a"].started <= found["b"].started
    assert found["a"].rows() == "rows of 1"


def test_rows_that_lie_elsewhere_are_asked_of_mlflow(monkeypatch):
    import mlflow

    monkeypatch.setattr(mlflow.artifacts, "load_text", lambda address: f"text of {address}")
    run = Stored("id", {}, {}, "mlflow-artifacts:/0/id/artifacts", 0)
    assert run.rows() == "text of mlflow-artifacts:/0/id/artifacts/rows.json"


@pytest.mark.parametrize("processes", [1, 2])
def test_without_a_store_or_processes_it_is_read_when_it_is_asked_for(outputs, tmp_path, monkeypatch, processes):
    read = []
    monkeypatch.setattr("pipeline.paper.stored.finished", lambda *about: read.append(about) or {})
    folder = outputs if processes == 1 else tmp_path
    with ahead(SETTINGS, folder, processes) as (stored, other):
        assert not read and other is None
        assert stored() == {} and read == [(SETTINGS, folder)]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_process_finds_the_same(outputs, tmp_path):
    with ahead(SETTINGS, outputs, 2) as (stored, other):
        assert other.submit(os.getpid).result() != os.getpid()
        found = stored()
        with pytest.raises(RuntimeError, match="after shutdown"):  # nothing is left in memory
            other.submit(os.getpid)
    assert found == finished(SETTINGS, outputs) and len(found) == 2
    (tmp_path / "mlflow.db").write_text("no database")
    with ahead(SETTINGS, tmp_path, 2) as (stored, _), pytest.raises(InputError, match=r"mlflow\.db can't be used"):
        stored()
