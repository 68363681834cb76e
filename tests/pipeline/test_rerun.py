"""A finished run measured again from what it stored."""

import sys

import mlflow
import pytest

from pipeline.rerun import beside, main, repeated
from pipeline.settings.errors import InputError

PHASES = "phase=[memory,perturbation,perplexity,fidelity,kept,correlation]"


@pytest.fixture
def outputs(small) -> str:
    return next(o for o in small if o.startswith("outputs="))


def test_all_metrics_but_times_come_out_again_in_every_digit(run, outputs, capsys, monkeypatch):
    first = run("method=wavelet_fourier", PHASES)
    mlflow.MlflowClient().set_tag(first.run_id, "table", "budgets,paper")
    monkeypatch.setattr(sys, "argv", ["pipeline.rerun", first.run_id[:10], outputs])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    found = mlflow.search_runs(experiment_names=["spectral-kv"], output_format="list")
    (again,) = [r for r in found if r.data.tags.get("rerun") == first.run_id]
    assert first.run_id in said and again.info.run_id in said and "all of " in said
    assert again.data.tags["identity"] == mlflow.get_run(first.run_id).data.tags["identity"]
    assert again.data.tags["table"] == "budgets,paper"  # the newest of an identity is the one that tables show
    compared = {name for name in first.metrics if not name.startswith(("time/", "prefill/"))}
    assert len(compared) > 25
    for name in compared:
        assert again.data.metrics[name] == first.metrics[name]


def test_what_differs_is_named(run, outputs):
    first = run("method=streaming")
    client = mlflow.MlflowClient()
    client.log_metric(first.run_id, "aop/mean", first.metrics["aop/mean"] + 1e-15)
    client.log_metric(first.run_id, "ppl/kl_vs_random-60-dense", 1.0)  # added by a comparison
    client.set_tag(first.run_id, "version.torch", "0.1")
    one, other = repeated(first.run_id, [outputs])
    found = beside(one, other)
    assert list(found.differing) == ["aop/mean"] and list(found.unlike) == ["version.torch"]
    assert found.unlike["version.torch"][0] == "0.1"
    assert "ppl/kl" in found.equal and "time/total_s" in found.timed


def test_a_setting_of_the_command_line_goes_first(run, outputs):
    first = run("method=random")
    mlflow.MlflowClient().set_tag(first.run_id, "table", "budgets")
    one, other = repeated(first.run_id, [outputs, "budget.tokens=100"])
    assert "table" not in other.data.tags
    assert (one.data.params["budget.resolved"], other.data.params["budget.resolved"]) == ("60", "100")
    assert "aop/mean" in beside(one, other).differing
    assert beside(one, other).unlike["budget.resolved"] == ("60", "100")


def test_prompts_are_run_again(run, outputs):
    from pipeline import run as runner

    first = run("method=streaming", "prefill_cache_least_s=0")
    runner._full_runs.clear()  # as in another process
    _, again = repeated(first.run_id, [outputs])
    assert (again.data.metrics["prefill/computed"], again.data.metrics["prefill/loaded"]) == (3, 0)


def test_refusals(run, outputs):
    first = run("method=streaming")
    with pytest.raises(InputError, match="no finished run has an id that begins with zzz"):
        repeated("zzz", [outputs])
    with pytest.raises(InputError, match=r"budget\.tokns=1 is no setting of run"):
        repeated(first.run_id, [outputs, "budget.tokns=1"])
    run("method=knorm")
    with pytest.raises(InputError, match="2 finished runs have ids that begin with : write more"):
        repeated("", [outputs])
    with pytest.raises(InputError, match="there is no store at"):
        repeated(first.run_id, [f"{outputs}-elsewhere"])
