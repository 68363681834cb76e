"""What the store holds: the same from its file as MLflow gives it."""

import shutil

import numpy as np
import pytest

from pipeline.paper import stored
from pipeline.paper.stored import Stored, finished
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
            if identity is None:
                mlflow.log_metric("none", float("nan"))
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


def test_a_file_is_read_as_mlflow_gives_it(outputs, monkeypatch):
    monkeypatch.setattr(tracking, "connect", lambda *about: pytest.fail("MLflow was asked"))
    found = stored._from_file(SETTINGS, outputs)
    monkeypatch.undo()
    assert repr(found) == repr(stored._from_mlflow(SETTINGS, outputs)) and len(found) == 4
    assert np.isnan(found[3].metrics["none"])
    assert stored._from_file(TrackingConfig(None, "another"), outputs) == []


def test_a_copied_store_reads_the_files_that_came_with_it(outputs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(outputs, copy)
    (copy / "artifacts" / finished(SETTINGS, copy)["a"].run_id / "artifacts" / "rows.json").write_text("others")
    assert finished(SETTINGS, copy)["a"].rows() == "others" and finished(SETTINGS, outputs)["a"].rows() == "rows of 1"


def test_what_a_file_does_not_say_is_asked_of_mlflow(tmp_path):
    assert finished(SETTINGS, tmp_path / "new") == {} and (tmp_path / "new" / "mlflow.db").is_file()
    for words in ("no database", ""):
        (tmp_path / "mlflow.db").write_text(words)
        assert stored._from_file(SETTINGS, tmp_path) == []
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(InputError, match=r"mlflow\.db can't be used"):
        finished(SETTINGS, tmp_path)
