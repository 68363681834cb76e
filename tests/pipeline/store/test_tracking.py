import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.settings.config import TrackingConfig
from pipeline.store import tracking

START = """
import sys
from pathlib import Path
from pipeline.store import tracking
from pipeline.settings.config import TrackingConfig
from pipeline.store.record import tracked
mlflow = tracking.connect(TrackingConfig(None, "x"), Path(sys.argv[1]))
with tracked(mlflow, "r", {"k": 1}, {}) as record:
    record.log(Path(sys.argv[1]) / "nothing", {"m": 1.0}, {})
"""


@pytest.mark.faults
def test_processes_that_start_together_on_a_fresh_store_all_get_in(tmp_path):
    count = 8
    processes = [
        subprocess.Popen([sys.executable, "-c", START, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, errors
    mlflow = tracking.connect(TrackingConfig(None, "x"), tmp_path)
    runs = mlflow.search_runs(experiment_names=["x"], output_format="list")
    assert [run.info.status for run in runs] == ["FINISHED"] * count


def test_the_list_of_runs_has_a_view_with_metrics(tmp_path, outputs_in):
    """Saved once, as the UI would; one that somebody changed stays as it is."""
    import base64
    import json
    import zlib

    from pipeline.store import view

    outputs = outputs_in(tmp_path)
    mlflow = tracking.connect(TrackingConfig(None, "x"), outputs)
    tags = mlflow.get_experiment(tracking.experiment_id()).tags
    found = json.loads(tags[view.TAG])
    state = json.loads(zlib.decompress(base64.b64decode(found["state"].removeprefix("deflate;"))))
    assert found["name"] == "Methods side by side" and "metrics.`ppl/kl`" in state["selectedColumns"]
    mlflow.MlflowClient().set_experiment_tag(tracking.experiment_id(), view.TAG, "changed")
    tracking._connected = None
    tracking.connect(TrackingConfig(None, "x"), outputs)
    assert mlflow.get_experiment(tracking.experiment_id()).tags[view.TAG] == "changed"


def refused_first(call, refusals: list[int]):
    """A call that a server refuses as PostgreSQL does, as many times as `refusals` has elements."""
    import mlflow

    def attempt(*given):
        if refusals:
            refusals.pop()
            raise mlflow.exceptions.MlflowException("duplicate key value violates unique constraint")
        return call(*given)

    return attempt


def test_of_two_processes_that_save_the_view_the_later_one_goes_on(tmp_path, outputs_in, monkeypatch):
    """A store that refuses twice is refused."""
    from pipeline.store import view

    mlflow = tracking.connect(TrackingConfig(None, "x"), outputs_in(tmp_path))
    client, refusals = mlflow.MlflowClient(), [1]
    experiment = mlflow.get_experiment(client.create_experiment("raced"))
    save = refused_first(client.set_experiment_tag, refusals)
    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", lambda self, *given: save(*given))
    view.offer(mlflow, experiment)
    assert mlflow.get_experiment(experiment.experiment_id).tags[view.TAG] == view.saved()
    refusals += [1, 1]
    with pytest.raises(mlflow.exceptions.MlflowException, match="duplicate"):
        view.offer(mlflow, experiment)


def test_of_two_processes_that_insert_a_dataset_the_later_one_goes_on(tmp_path, outputs_in):
    from pipeline.store.record import Record

    mlflow = tracking.connect(TrackingConfig(None, "x"), outputs_in(tmp_path))
    client, refusals = mlflow.MlflowClient(), [1]
    run = client.create_run(tracking.experiment_id())
    client.log_inputs = refused_first(client.log_inputs, refusals)
    record = Record(client, run.info.run_id)
    record.reads("text", "digest", {"windows": 3})
    (found,) = client.get_run(run.info.run_id).inputs.dataset_inputs
    assert found.dataset.name == "text"
    refusals += [1, 1]
    with pytest.raises(mlflow.exceptions.MlflowException, match="duplicate"):
        record.reads("other", "digest", {})


def test_a_rerun_names_how_many_threads_shared_the_sums(monkeypatch):
    import torch

    from pipeline.rerun import beside

    def run(threads: int) -> SimpleNamespace:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return SimpleNamespace(data=SimpleNamespace(metrics={"m": 1.0}, params={}, tags=tracking.environment()))

    assert beside(run(1), run(2)).unlike == {"threads": ("1", "2")}
    assert beside(run(2), run(2)).unlike == {}
