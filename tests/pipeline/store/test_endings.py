"""How a run ends when something goes wrong inside it: its status, its traceback, and what the sweep does then."""

import sys

import pytest
import torch

from pipeline.phases.memory import Memory
from pipeline.settings import cli
from pipeline.settings.compose import composed
from pipeline.settings.errors import DiskFull, Exhausted, exhausted
from pipeline.store import record, tracking
from pipeline.store.search import chosen


def outputs_of(small: list[str]) -> str:
    return next(o for o in small if o.startswith("outputs="))


def swept(monkeypatch, small, *overrides: str) -> int:
    """Exit status of a sweep in this process."""
    settings = [o for o in small if not o.startswith("budget.tokens=")]
    monkeypatch.setattr(sys, "argv", ["pipeline", *settings, *overrides, "-m"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def failing(monkeypatch, error: BaseException) -> None:
    """The memory phase fails where 60 tokens are kept."""
    measure = Memory.measure

    def sometimes(self, context):
        if context.compressed.kept[0].shape[-1] == 60:
            raise error
        return measure(self, context)

    monkeypatch.setattr(Memory, "measure", sometimes)


def states() -> dict[str, str]:
    import mlflow

    runs = mlflow.MlflowClient().search_runs([tracking.experiment_id()])
    return {r.data.params["budget.resolved"]: r.info.status for r in runs if tracking.PARENT not in r.data.tags}


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError(), marks=pytest.mark.slow),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        pytest.param(
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_out_of_memory_is_a_sentence_and_the_sweep_goes_on(small, monkeypatch, capsys, error):
    failing(monkeypatch, error)
    assert swept(monkeypatch, small, "method=random", "budget=60,100") == 1
    assert capsys.readouterr().err.count("pipeline: the run ran out of memory: lower document.tokens") == 1
    assert states() == {"60": "FAILED", "100": "FINISHED"}


def test_a_defect_is_named_at_once_and_shown_at_the_end(small, monkeypatch, capsys):
    failing(monkeypatch, RuntimeError("the phase broke"))
    settings = [o for o in small if not o.startswith("budget.tokens=")]
    monkeypatch.setattr(sys, "argv", ["pipeline", *settings, "method=random", "budget=60,100", "-m"])
    with pytest.raises(RuntimeError, match="the phase broke"):  # with its traceback, and exit status 1
        cli.main()
    said = capsys.readouterr().err
    assert "pipeline: the run failed, RuntimeError: the phase broke; MLflow run" in said
    assert states() == {"60": "FAILED", "100": "FINISHED"}
    failed, above = (r for r in tracking_runs() if r.info.status == "FAILED")  # the run, and the one above the sweep
    assert tracking.PARENT in above.data.tags
    assert failed.data.tags["failure"] == "RuntimeError: the phase broke"


def tracking_runs() -> list:
    import mlflow

    return mlflow.MlflowClient().search_runs([tracking.experiment_id()])


def test_a_full_disk_stops_the_sweep_with_one_sentence(small, monkeypatch, capsys):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.Record, "log", full)
    assert swept(monkeypatch, small, "method=random", "budget=60,100") == 1
    errors = capsys.readouterr().err
    assert errors.count("is full: free some space") == 1 and outputs_of(small) in errors
    assert states() == {"60": "FAILED"}


def test_artifacts_and_metrics_are_there_before_the_status(run, monkeypatch):
    """Whatever fails on the way, the run is not FINISHED."""
    import mlflow

    def broken(self, run_id, *arguments, **more):
        raise OSError(5, "Input/output error")

    real = mlflow.MlflowClient.log_batch

    def broken_for_metrics(self, run_id, *arguments, **more):
        return broken(self, run_id) if "metrics" in more else real(self, run_id, *arguments, **more)

    for name, double in (("log_artifact", broken), ("log_batch", broken_for_metrics)):
        with monkeypatch.context() as patched:
            patched.setattr(mlflow.MlflowClient, name, double)
            with pytest.raises(OSError, match="Input/output"):
                run("method=random")
    assert [r.info.status for r in tracking_runs()] == ["FAILED"] * 2


def test_reasons_are_found_behind_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise ValueError("the store failed") from error
    except ValueError as error:
        assert isinstance(exhausted(error, "o"), DiskFull)
    assert isinstance(exhausted(RuntimeError("(sqlite3.OperationalError) database or disk is full"), "o"), DiskFull)
    assert type(exhausted(MemoryError(), "o")) is Exhausted
    assert exhausted(OSError(5, "Input/output error"), "o") is None


def test_runs_carry_what_people_and_the_doctor_look_for(run):
    result = run("method=random", "tracking.table=first", "tracking.sweep=mine", "tracking.figures=true")
    outputs = f"outputs={result.store.removeprefix('sqlite:///').removesuffix('/mlflow.db')}"
    (found,) = chosen([outputs, "table=first"])
    tags = found.data.tags
    assert tags["sweep"] == "mine" and {"process.host", "process.pid", "process.started"} <= set(tags)
    assert "Random" in tags["mlflow.note.content"] and "60 of 200 tokens" in tags["mlflow.note.content"]
    assert {"method.name", "model.name", "storage.name", "document.name", "budget.resolved"} <= set(found.data.params)
    import mlflow

    client = mlflow.MlflowClient()
    figures = {file.path for file in client.list_artifacts(found.info.run_id, "figures")}
    assert figures == {"figures/kept_tokens.png", "figures/aop_by_layer.png"}
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"config.yaml", "figures", "rows.json"}
    assert run("method=random", "tracking.table=second").run_id == result.run_id
    assert client.get_run(result.run_id).data.tags["table"] == "first,second"  # found for another table
    assert [r.info.run_id for r in chosen([outputs, "table=second"])] == [result.run_id]
    assert composed(["experiment=paper"]).tracking.table == "paper" and composed([]).tracking.table is None


def test_the_load_of_the_machine_is_recorded_where_mlflow_is_told_to(run, monkeypatch):
    import mlflow

    found = []
    for wanted in ("false", "true"):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", wanted)
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
        result = run("method=random", f"seed={len(found)}")
        metrics = mlflow.MlflowClient().get_run(result.run_id).data.metrics
        found.append({name for name in metrics if name.startswith("system/")})
        assert {name for name in result.metrics if name.startswith("system/")} == set()  # they are none of the run's
    assert found[0] == set() and "system/cpu_utilization_percentage" in found[1]


def test_turns_are_curves(run):
    options = [
        "phase=[memory,perturbation,perplexity,drift]",
        "phase.drift.turns=3",
        "phase.drift.tokens=12",
        "phase.drift.positions=4",
    ]
    import mlflow

    result = run("method=random", *options)
    history = mlflow.MlflowClient().get_metric_history(result.run_id, "drift/aop")
    assert [point.step for point in history] == [1, 2, 3] and len({point.value for point in history}) == 3
