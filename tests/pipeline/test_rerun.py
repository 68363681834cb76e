"""A finished run measured again from what it stored."""

import sys

import mlflow
import pytest
from omegaconf import OmegaConf

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


def test_a_run_that_shared_prefills_with_others_comes_out_again_alone(run, outputs):
    """Prefills that remember queries for SnapKV serve StreamingLLM, too, and are no part of what it measures."""
    from pipeline import run as runner

    run("method=snapkv")
    first = run("method=streaming")
    assert first.metrics["prefill/reused"] == 3
    runner._full_runs.clear()  # as in another process
    assert beside(*repeated(first.run_id, [outputs])).differing == {}


def test_a_setting_may_be_spelled_as_for_a_run(run, outputs):
    first = run("method=random")
    _, other = repeated(first.run_id, [outputs, "budget=100", "document.count=2"])
    assert (other.data.params["budget.resolved"], other.data.params["document.count"]) == ("100", "2")


def rewritten(first, text: str) -> None:
    """The stored configuration of a run, with other text in it."""
    mlflow.MlflowClient().log_text(first.run_id, text, "config.yaml")


def test_a_configuration_of_before_a_setting_was_there_has_its_default(run, outputs):
    first = run("method=streaming")
    stored = OmegaConf.create(mlflow.artifacts.load_text(f"runs:/{first.run_id}/config.yaml"))
    for key in ("refit", "prefill_cache_least_s", "grid"):
        del stored[key]
    del stored.tracking["figures"]
    stored.colour = "blue"  # of somebody's own project
    rewritten(first, OmegaConf.to_yaml(stored))
    assert beside(*repeated(first.run_id, [outputs])).differing == {}


def test_a_repetition_that_fails_says_of_what_it_was_one(run, outputs, monkeypatch):
    from pipeline.phases.memory import Memory

    def broken(self, context):
        raise RuntimeError("the phase broke")

    first = run("method=streaming")
    mlflow.MlflowClient().set_tag(first.run_id, "sweep", "mine")
    monkeypatch.setattr(Memory, "measure", broken)
    with pytest.raises(RuntimeError, match="the phase broke"):
        repeated(first.run_id, [outputs])
    failed, _ = mlflow.search_runs(experiment_names=["spectral-kv"], output_format="list")
    assert (failed.info.status, failed.data.tags["rerun"]) == ("FAILED", first.run_id)
    assert failed.data.tags["sweep"] == "mine"


def test_refusals(run, outputs, monkeypatch, capsys):
    first = run("method=streaming")
    with pytest.raises(InputError, match="no finished run has an id that begins with zzz"):
        repeated("zzz", [outputs])
    for override, words in (
        ("budget.tokns=1", r"budget\.tokns=1 is no setting of run"),
        ("+budget.tokns=1", "is no setting of run"),
        ("method=random", "method=random chooses another option than run .* python -m pipeline method=random"),
        ("budget.tokens=[1", r"budget\.tokens=\[1 can't be read: write setting=value"),
        ("budget.tokens", "can't be read: write setting=value"),
        ("budget=60,100", "budget.tokens=60,100 has several values"),
        ("budget.tokens=many", "budget.tokens=many can't be used"),
        ("seed=[1]", "seed=.* can't be used"),
    ):
        with pytest.raises(InputError, match=words):
            repeated(first.run_id, [outputs, override])
    for text in ("method: [", "just words", "method: {name: x}"):
        rewritten(first, text)
        with pytest.raises(InputError, match=f"the config.yaml of run {first.run_id} is damaged"):
            repeated(first.run_id, [outputs])
    for words, said in (
        ([outputs, "abc", "seed=1"], "no finished run has an id that begins with abc"),  # wherever among the settings
        ([outputs], "0 ids of runs are given"),
        (["abc", "def", outputs], "2 ids of runs are given"),
    ):
        monkeypatch.setattr(sys, "argv", ["pipeline.rerun", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and said in capsys.readouterr().err
    run("method=knorm")
    with pytest.raises(InputError, match="2 finished runs have ids that begin with : write more"):
        repeated("", [outputs])
    with pytest.raises(InputError, match="there is no store at"):
        repeated(first.run_id, [f"{outputs}-elsewhere"])
