import subprocess
import sys

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


def test_of_two_processes_that_save_the_view_the_later_one_goes_on(tmp_path, outputs_in, monkeypatch):
    """A server on PostgreSQL refuses the second insert; a store that refuses for good is still refused."""
    from pipeline.store import view

    mlflow = tracking.connect(TrackingConfig(None, "x"), outputs_in(tmp_path))
    client = mlflow.MlflowClient()
    seen_before = mlflow.get_experiment(client.create_experiment("raced"))
    save = mlflow.MlflowClient.set_experiment_tag

    def refused(self, *given):
        raise mlflow.exceptions.MlflowException("duplicate key value violates unique constraint")

    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", refused)
    with pytest.raises(mlflow.exceptions.MlflowException, match="duplicate"):
        view.offer(mlflow, seen_before)
    save(client, seen_before.experiment_id, view.TAG, view.saved())
    view.offer(mlflow, seen_before)


def test_of_two_processes_that_insert_a_dataset_the_later_one_goes_on(tmp_path, outputs_in):
    """The first attempt is refused as PostgreSQL does; a store that refuses for good is still refused."""
    from pipeline.store.record import Record

    mlflow = tracking.connect(TrackingConfig(None, "x"), outputs_in(tmp_path))
    client = mlflow.MlflowClient()
    run = client.create_run(tracking.experiment_id())
    insert, refusals = client.log_inputs, [1]

    def raced(*given):
        if refusals.pop() if refusals else 0:
            raise mlflow.exceptions.MlflowException("duplicate key value violates unique constraint")
        insert(*given)

    client.log_inputs = raced
    record = Record(client, run.info.run_id)
    record.reads("text", "digest", {"windows": 3})
    (found,) = client.get_run(run.info.run_id).inputs.dataset_inputs
    assert found.dataset.name == "text"
    refusals += [1, 1]
    with pytest.raises(mlflow.exceptions.MlflowException, match="duplicate"):
        record.reads("other", "digest", {})


def test_a_run_says_how_many_threads_shared_its_sums():
    import torch

    from pipeline.rerun import ALIKE

    assert tracking.environment()["threads"] == str(torch.get_num_threads()) and "threads" in ALIKE
