"""The run above the runs of a sweep, and what a run says of itself in the UI."""

import os
import signal
import sys

import mlflow
import pytest

from pipeline.doctor import incomplete, unfinished
from pipeline.settings import cli
from pipeline.store import tracking
from pipeline.store.search import chosen
from pipeline.store.sweeps import NESTED, curves, described


@pytest.fixture
def sweep(small, monkeypatch):
    """Runs a sweep in this process; the runs above and below."""

    def run(*overrides: str) -> tuple[list, list, int]:
        settings = [o for o in small if not o.startswith("budget.tokens=")]
        monkeypatch.setattr(sys, "argv", ["pipeline", *settings, *overrides, "-m"])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        found = mlflow.search_runs(experiment_names=["spectral-kv"], output_format="list")
        above = [run for run in found if tracking.PARENT in run.data.tags]
        return above, [run for run in found if run not in above], status

    return run


def test_a_sweep_is_one_run_above_its_own(sweep, small):
    (above,), below, status = sweep("method=random,streaming", "budget=60,100")
    assert status == 0 and above.info.status == "FINISHED" and len(below) == 4
    assert {run.data.tags[NESTED] for run in below} == {above.info.run_id}
    note = above.data.tags["mlflow.note.content"]
    assert "budget.tokens=60,100" in note and note.count("StreamingLLM") == 2
    client = mlflow.MlflowClient()
    history = client.get_metric_history(above.info.run_id, "ppl/kl over budgets/StreamingLLM")
    expected = {
        int(run.data.params["budget.resolved"]): run.data.metrics["ppl/kl"]
        for run in below
        if run.data.params["method.name"] == "streaming"
    }
    assert {point.step: point.value for point in history} == expected and len(expected) == 2
    assert list(incomplete(client, [above])) == []  # it has no rows of its own
    assert above.info.run_id not in {run.info.run_id for run in chosen([next(o for o in small if "outputs=" in o)])}


def test_the_run_above_names_the_process_that_launched_the_sweep(sweep, monkeypatch):
    """Whichever machine its first job ran on: the doctor may not close it when that job has ended."""

    def closed_by_mistake(result) -> None:
        client = mlflow.MlflowClient()
        above = client.get_run(client.get_run(result.run_id).data.tags[NESTED])
        client.set_tag(above.info.run_id, "failure", "is RUNNING but its process is gone")

    told = "++hydra.job.env_set.SPECTRAL_KV_LAUNCHER='login-host 4711 12.50'"
    monkeypatch.setattr("pipeline.store.sweeps.launched", lambda: told)
    monkeypatch.setattr("pipeline.show.summary.show", closed_by_mistake)
    (above,), (below,), status = sweep("method=streaming", "budget=60")
    assert status == 0 and above.info.status == "FINISHED" and "failure" not in above.data.tags
    named = [above.data.tags[f"process.{name}"] for name in ("host", "pid", "started")]
    assert named == ["login-host", "4711", "12.50"] and below.data.tags["process.pid"] == str(os.getpid())
    assert "SPECTRAL_KV_LAUNCHER" not in os.environ


def test_a_name_with_quotes_is_a_name(sweep):
    for budget in (60, 100):
        (above,), below, status = sweep("method=streaming", f"budget={budget}", """tracking.sweep="bob's" """.strip())
        assert status == 0 and above.data.tags["sweep"] == "bob's"
    assert len(below) == 2


def test_a_sweep_that_is_terminated_between_two_jobs_is_killed(sweep, monkeypatch):
    monkeypatch.setattr("pipeline.show.summary.show", lambda result: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    (above,), below, status = sweep("method=random,streaming", "budget=60")
    assert (status, above.info.status, len(below)) == (143, "KILLED", 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_that_fails_fails_the_sweep_and_what_was_measured_makes_no_second_one(sweep):
    (above,), below, status = sweep("method=streaming", "budget=0,60")
    assert status == 2 and above.info.status == "FAILED" and len(below) == 1
    everything, _, status = sweep("method=streaming", "budget=60")
    assert status == 0 and len(everything) == 1  # nothing was measured: nothing to hold together


def test_a_run_outside_of_sweeps_has_none_above_and_says_what_came_out(run):
    result = run("method=streaming")
    found = mlflow.get_run(result.run_id)
    assert NESTED not in found.data.tags
    note = found.data.tags["mlflow.note.content"]
    assert f"| KL(full || compressed), nats | {result.metrics['ppl/kl']:.3f} |" in note.replace("\\|", "|")
    (reads,) = found.inputs.dataset_inputs
    assert reads.dataset.digest == found.data.tags["hash.document"] and "tokens of" in reads.dataset.name


class Child:
    """A run as far as curves need it."""

    def __init__(self, title: str, budget: str, kl: float, start: int = 0):
        from types import SimpleNamespace

        self.data = SimpleNamespace(tags={"title": title}, params={"budget.resolved": budget}, metrics={"ppl/kl": kl})
        self.info = SimpleNamespace(start_time=start)


def test_curves_are_over_budgets_alone():
    runs = [Child("A", "100", 0.1), Child("A", "50", 0.2), Child("B", "50", 0.3), Child("Full", "all", 0.0)]
    assert curves(runs) == {"ppl/kl over budgets/A": {50: 0.2, 100: 0.1}}
    assert curves([*runs, Child("A", "50", 0.9)]) == {}  # something else was varied, too
    assert described([]) == "Nothing was measured."
    assert "allocation" not in described(runs)
    runs[1].data.params["budget.allocation"] = "head"
    head, _, first, second, *_ = described(runs).split("\n")
    assert (head.split(" | ")[4], first.split(" | ")[4], second.split(" | ")[4]) == ("allocation", "uniform", "head")


def test_the_doctor_closes_a_sweep_whose_process_is_gone(sweep):
    (above,), _, _ = sweep("method=streaming", "budget=60")
    client = mlflow.MlflowClient()
    client.update_run(above.info.run_id, status="RUNNING")
    client.set_tag(above.info.run_id, "process.pid", "999999999")
    (finding,) = unfinished([client.get_run(above.info.run_id)], all_hosts=False)
    assert finding.status == "KILLED"
