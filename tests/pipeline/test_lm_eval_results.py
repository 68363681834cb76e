"""Results of lm-evaluation-harness in the store."""

import json

import mlflow
import pytest

from pipeline.lm_eval import log, metrics
from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError

FOUND = {
    "results": {
        "a_task": {"alias": "a_task", "exact_match,stripped": 0.25, "exact_match_stderr,stripped": 0.1},
        "b_task": {"acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 6},
    },
    "config": {
        "model": "spectral_kv",
        "model_args": {"budget": 100},
        "spectral_kv": {"method": "keydiff", "budget": 100, "loglikelihood": {"evicted_tokens": 33}},
    },
}


def test_scores_and_evictions_are_metrics():
    assert metrics(FOUND) == {
        "lm_eval/a_task/exact_match/stripped": 0.25,
        "lm_eval/a_task/exact_match_stderr/stripped": 0.1,
        "lm_eval/b_task/acc": 0.5,
        "lm_eval/b_task/sample_len": 6.0,
        "lm_eval/loglikelihood/evicted_tokens": 33.0,
    }


def test_a_file_becomes_a_finished_run(tmp_path, outputs_in):
    path = tmp_path / "results_now.json"
    path.write_text(json.dumps(FOUND))
    outputs = outputs_in(tmp_path)
    run = mlflow.get_run(log(path, TrackingConfig(None, "harness"), outputs))
    assert run.info.status == "FINISHED" and run.data.metrics["lm_eval/b_task/acc"] == 0.5
    assert run.data.params["method"] == "keydiff" and run.data.params["lm_eval.model"] == "spectral_kv"
    (artifact,) = mlflow.MlflowClient().list_artifacts(run.info.run_id)
    assert artifact.path == "results_now.json"


@pytest.mark.parametrize("text", ["", "[]", '{"results": {}}', '{"results": 1, "config": {}}'])
def test_another_file_is_refused(tmp_path, outputs_in, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match="does not hold results of lm_eval"):
        log(path, TrackingConfig(None, "harness"), outputs_in(tmp_path))
