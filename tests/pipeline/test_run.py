import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.job import prepare
from pipeline.run import measure
from pipeline.settings.compose import composed
from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError
from pipeline.store import tracking
from pipeline.store.record import tracked


def store(result):
    """An MLflow client on the store that holds a result."""
    import mlflow

    mlflow.set_tracking_uri(result.store)
    return mlflow.MlflowClient()


def rows_of(client, run_id: str) -> dict:
    path = client.download_artifacts(run_id, "rows.json")
    with open(path) as file:
        return json.load(file)


def test_a_run_is_recorded_with_everything_that_explains_it(run):
    result = run("method=wavelet_tri", "document.count=5")
    client = store(result)
    record = client.get_run(result.run_id)
    assert record.info.status == "FINISHED"
    metrics, params, tags = record.data.metrics, record.data.params, record.data.tags
    for name in ("aop/mean", "aop/p95", "aop/max", "ppl/nd", "ppl/kl", "ppl/top1", "memory/ratio", "memory/bytes"):
        assert np.isfinite(metrics[name])
    assert 0 < metrics["aop/mean"] <= metrics["aop/p95"] <= metrics["aop/max"]
    assert metrics["aop/mean_low"] < metrics["aop/mean"] < metrics["aop/mean_high"]
    described = (params["method.name"], params["budget.tokens"], params["method.reads"])
    assert described == ("wavelet_tri", "60", "keys, calibration")
    hashes = {"hash.model", "hash.document", "hash.code"}
    assert hashes | {"git.revision", "version.torch", tracking.CONFIGURATION} <= set(tags)
    table = rows_of(client, result.run_id)
    rows = pd.DataFrame(table["data"], columns=table["columns"])
    per_head = rows[(rows["metric"] == "aop/mean") & rows["layer"].notna()]
    assert len(per_head) == 5 * 2 * 4  # documents, layers, query heads
    assert per_head["value"].mean() == pytest.approx(metrics["aop/mean"], rel=1e-5)
    largest = rows[rows["metric"] == "aop/largest"]
    assert largest[["layer", "head", "position"]].notna().all(axis=None)
    assert largest["value"].mean() == pytest.approx(metrics["aop/max"])
    assert "wavelet_tri" in Path(client.download_artifacts(result.run_id, "config.yaml")).read_text()


def test_memory_counts_exactly_the_kept_tokens(run):
    metrics = run("method=streaming").metrics
    token = 2 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, dim, bytes
    assert metrics["memory/tokens"] == 60
    assert metrics["memory/bytes"] == 60 * token
    assert metrics["memory/ratio"] == pytest.approx(200 / 60)
    assert metrics["memory/mb_after_generation"] == pytest.approx(68 * token / 1e6)


def test_the_full_cache_and_a_budget_that_holds_everything_change_nothing(run):
    for overrides in (["method=full"], ["method=wavelet", "budget=200"], ["method=random", "budget.ratio=1"]):
        metrics = run(*overrides).metrics
        for name in ("aop/mean", "aop/max", "ppl/nd", "ppl/delta_nll", "ppl/kl"):
            assert metrics[name] == 0
        assert metrics["ppl/top1"] == metrics["memory/ratio"] == 1


def test_every_method_keeps_other_tokens_and_finishes(run, small):
    results = {
        m: run(f"method={m}")
        for m in ("fourier", "wavelet", "wavelet_fourier", "wavelet_tri", "tri", "random", "streaming")
    }
    assert len({r.metrics["aop/mean"] for r in results.values()}) == len(results)
    assert {r.metrics["memory/tokens"] for r in results.values()} == {60}


def test_perplexity_scores_the_tokens_after_the_first(run, backend, small):
    """Against a plain computation from the logits of the model on whole windows."""
    job = prepare(composed([*small, "method=full", "backend.cache_dtype=float32"]))
    metrics = run("method=full", "backend.cache_dtype=float32").metrics
    expected = []
    for window in job.windows:
        cache = backend.compress(backend.prefill(window[:1], 1), None, job.settings.storage)
        logits = backend.extend(cache, window[1:]).logits.double().numpy()
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected.append(np.exp(-np.mean([logp[t - 2, window[t]] for t in range(201, 240)])))
    assert metrics["ppl/full"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_perplexity_of_part_of_the_continuation_is_still_exact_for_the_full_cache(run):
    metrics = run("method=full", "phase.perplexity.tokens=20").metrics
    assert metrics["ppl/nd"] == metrics["ppl/kl"] == 0
    assert metrics["ppl/full"] != run("method=full").metrics["ppl/full"]


def test_a_prompt_no_longer_than_the_budget_is_kept_whole(run):
    metrics = run("method=wavelet", "document.tokens=20", "budget=20", "budget.recent=15").metrics
    assert (metrics["memory/tokens"], metrics["aop/max"], metrics["ppl/nd"]) == (20, 0, 0)


def test_a_metric_that_is_no_number_does_not_finish(run, monkeypatch):
    from pipeline.phases.memory import Memory

    monkeypatch.setattr(Memory, "measure", lambda self, context: [{"metric": "memory/mb", "value": float("nan")}])
    with pytest.raises(RuntimeError, match="memory/mb came out as not a number"):
        run("method=random", "seed=11")


def test_versions_are_part_of_the_identity(small, monkeypatch):
    import pipeline.job as job

    before = prepare(composed(small)).digest
    assert prepare(composed(small)).digest == before
    monkeypatch.setattr(job, "version", lambda name: "0.0.0")
    assert prepare(composed(small)).digest != before


def test_where_it_ran_is_part_of_the_identity(run, monkeypatch):
    from spectral_kv.backends.torch import TorchBackend

    first = run("method=streaming")
    assert run("method=streaming", "backend.device=cpu").reused is False  # another configuration
    monkeypatch.setattr(TorchBackend, "place", staticmethod(lambda device, dtype: ("cpu", "bfloat16")))
    assert run("method=streaming").run_id != first.run_id


def test_the_second_job_of_a_process_does_not_prefill_again(run):
    first, second = run("method=fourier", "seed=1"), run("method=fourier", "budget=100", "seed=1")
    assert first.metrics["prefill/computed"] + first.metrics["prefill/reused"] == 3
    assert (second.metrics["prefill/computed"], second.metrics["prefill/reused"]) == (0, 3)
    assert second.metrics["memory/bytes"] > first.metrics["memory/bytes"]


def test_a_bound_on_memory_prefills_again(run):
    run("method=fourier", "prefill_memory_gb=0", "prefill_cache_gb=0")
    assert run("method=wavelet", "prefill_memory_gb=0", "prefill_cache_gb=0").metrics["prefill/computed"] == 3


def test_a_finished_configuration_is_returned_and_measured_again_on_request(run):
    first = run("method=random")
    again = run("method=random")
    assert again.reused and again.run_id == first.run_id and again.metrics == first.metrics
    assert run("method=random", "force=true").run_id != first.run_id
    other_seed = run("method=random", "seed=3")
    assert not other_seed.reused and other_seed.metrics["aop/mean"] != first.metrics["aop/mean"]


def test_the_same_configuration_on_another_document_is_another_result(run, tmp_path):
    text = tmp_path / "text.txt"
    options = [
        "method=streaming",
        "document=file",
        f"document.path={text}",
        "document.tokens=200",
        "document.continuation=40",
    ]
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    first = run(*options)
    text.write_text("Pack my box with five dozen liquor jugs, please. " * 200)
    assert not run(*options).reused
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    assert run(*options).run_id == first.run_id


def test_a_failure_ends_failed_with_its_traceback(run, monkeypatch):
    from pipeline.phases.memory import Memory

    def broken(self, context):
        raise RuntimeError("the phase broke")

    first = run("method=random")
    monkeypatch.setattr(Memory, "measure", broken)
    with pytest.raises(RuntimeError, match="the phase broke"):
        run("method=random", "seed=5")
    client = store(first)
    experiment = client.get_experiment_by_name("spectral-kv").experiment_id
    failed, finished = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert "the phase broke" in Path(client.download_artifacts(failed.info.run_id, "traceback.txt")).read_text()
    monkeypatch.undo()
    assert not run("method=random", "seed=5").reused  # a failed run is not taken for done


def test_refuses_before_loading_what_can_not_run(small, checkpoint, tmp_path):
    def refusal(*overrides) -> str:
        with pytest.raises(InputError) as caught:
            prepare(composed([*small, *overrides]))
        return str(caught.value)

    assert "model.calibration" in refusal("method=tri", "model.calibration=null")
    assert "python -m pipeline.calibrate" in refusal("method=tri", "model.calibration=/nowhere")
    assert "model.path=/nowhere" in refusal("model.path=/nowhere")
    assert "holds no config.json" in refusal(f"model.path={tmp_path}")
    assert "2048 positions" in refusal("document.tokens=2040")
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json can't be read" in refusal(f"model.path={broken}")
    (broken / "config.json").write_text("{}")
    assert "names no hidden_size" in refusal(f"model.path={broken}")
    (broken / "config.json").write_text("{")
    assert "not valid JSON" in refusal(f"model.path={broken}")
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert f"outputs={blocker}" in refusal(f"outputs={blocker}")


def test_damaged_weights_are_one_sentence_and_a_failed_run(run, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="model=qwen2_5_0_5b can't be loaded"):
        run(f"model.path={broken}", "method=random")


def test_a_store_that_can_not_be_used_is_one_sentence(run):
    for uri in ("http://localhost:9", "nonsense://x"):
        with pytest.raises(InputError, match=f"tracking.uri={uri} can't be"):
            run("method=random", f"tracking.uri={uri}")


def test_a_hub_model_without_network_is_one_sentence(small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"model.id=nobody/nothing .* set model.path"):
        prepare(composed([*small, "model.path=null", "model.id=nobody/nothing"]))


def test_the_store_is_in_wal_mode_and_artifacts_lie_beside_it(run, tmp_path):
    import sqlite3

    result = run("method=random")
    database = tmp_path / "outputs" / "mlflow.db"
    assert result.store == f"sqlite:///{database}"
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    assert list((tmp_path / "outputs" / "artifacts").glob(f"{result.run_id}/artifacts/rows.json"))


def test_an_interrupted_run_is_killed_not_finished(tmp_path):
    import os
    import signal

    mlflow = tracking.connect(TrackingConfig(None, "x"), tmp_path)
    ids = []
    for action in (lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
        with pytest.raises(KeyboardInterrupt), tracked(mlflow, "r", {}, {}) as record:
            ids.append(record.run_id)
            action()
    assert {mlflow.get_run(i).info.status for i in ids} == {"KILLED"}


def test_refuses_statistics_of_other_weights_and_of_the_text_that_is_measured(small, statistics, tmp_path, checkpoint):
    prepare(composed([*small, "method=tri"]))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    with pytest.raises(
        InputError, match=r"model.calibration=\S+ was measured on other weights \(hash .*: run `python -m"
    ):
        prepare(composed([*small, "method=tri", f"model.path={other}"]))
    novel = ["document=book", "document.title=northanger_abbey"]  # what the fixture's statistics were measured on
    with pytest.raises(InputError, match="which is also what the documents are cut from: choose another document"):
        prepare(composed([*small, "method=tri", *novel]))
    prepare(composed([*small, "method=knorm", *novel]))  # which reads no statistics
    prepare(composed(["method=tri", "model=reference"]))  # the statistics that come with the model are of the model


def test_a_text_counts_by_what_it_is_made_of_not_by_the_kind_of_the_documents(tmp_path):
    from pipeline.documents.book import Book, Calibration
    from pipeline.documents.file import File
    from pipeline.documents.mixed import Mixed
    from pipeline.documents.needles import Needles
    from pipeline.documents.pydoc import Pydoc
    from pipeline.job import _measured_on

    def shared(measured, documents):
        return _measured_on({"text": measured.source, "texts": "; ".join(sorted(measured.made_of()))}, documents)

    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("one")
    other.write_text("other")
    assert shared(Pydoc(), Needles()) == "Python's language reference"
    assert shared(Calibration(), Book(title="northanger_abbey")) == "northanger_abbey"
    assert shared(Book(title="persuasion"), Needles(text="persuasion")) == "persuasion"
    assert shared(Book(title="northanger_abbey"), Book(title="persuasion")) is None
    assert shared(Calibration(), Book(title="persuasion")) is shared(Mixed(), Pydoc()) is None
    assert shared(File(path=str(one)), File(path=str(other))) is None
    other.write_text("one")
    assert shared(File(path=str(one)), File(path=str(other))).startswith("sha256")
    # files that say the kind alone, as those that come along
    assert _measured_on({"text": "the calibration text"}, Book(title="northanger_abbey")) == "northanger_abbey"
    assert _measured_on({"text": "mixed text"}, Calibration()) is not None
    assert _measured_on({}, Pydoc()) is None


@pytest.mark.parametrize("method", ["h2o", "observed_attention", "expected_attention", "snapkv", "streaming"])
def test_a_prompt_in_chunks_gives_the_numbers_of_a_prompt_at_once(run, method):
    whole = run(f"method={method}", "backend.cache_dtype=float32")
    pieces = run(f"method={method}", "backend.cache_dtype=float32", "backend.chunk=64")
    assert not pieces.reused
    for metric in ("aop/mean", "ppl/comp", "mass/mean"):
        assert pieces.metrics[metric] == pytest.approx(whole.metrics[metric], rel=1e-3)


def test_h2o_gives_half_of_the_budget_to_recent_tokens(small):
    found = measure(prepare(composed([*small, "method=h2o", "budget.sinks=4"])))
    for layer in found.kept:
        for head in layer:
            assert set(range(4)) <= set(head.tolist()) and set(range(200 - 28, 200)) <= set(head.tolist())
            assert len(head) == 60


def test_threads_that_wait_sleep_unless_the_user_wants_them_to_spin(monkeypatch):
    import importlib

    import pipeline

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    importlib.reload(pipeline)
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    importlib.reload(pipeline)
    assert os.environ["OMP_WAIT_POLICY"] == "active"
