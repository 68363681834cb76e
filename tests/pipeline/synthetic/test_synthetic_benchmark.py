"""The synthetic benchmark from configuration to metrics: every method of its experiment, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.compare import compare, documents
from pipeline.documents.synthetic import Synthetic
from pipeline.job import prepare
from pipeline.phases.planted import Planted
from pipeline.run import execute
from pipeline.settings.compose import composed, sweep
from pipeline.settings.errors import InputError
from pipeline.show.summary import show
from spectral_kv.selection import Budget

SMALL_BUDGET = ["budget.tokens=140", "budget.recent=16"]
TINY = ["document.tokens=512", "document.continuation=64", "document.count=3", "model.planted=0.03125", *SMALL_BUDGET]
TINY += ["phase.memory.generated=8", "phase.perturbation.positions=16", "tracking.figures=false"]
ALONE = ["backend=synthetic", "model=synthetic", "document=synthetic"]


@pytest.fixture(scope="module")
def outputs(outputs_in, tmp_path_factory):
    return f"outputs={outputs_in(tmp_path_factory.mktemp('synthetic'))}"


@pytest.fixture(scope="module")
def results(outputs):
    """A result a method of the experiment, without those that are like another one here."""
    chosen = "method=full,turboquant,wavelet,tri,snapkv,h2o,knorm,random,oracle_mass,oracle_value"
    jobs = [prepare(composed(job)) for job in sweep("synthetic", [*TINY, chosen, outputs])]
    return {job.settings.method.name: execute(job) for job in jobs}


@pytest.mark.slow
def test_every_method_of_the_experiment_leaves_a_finished_run(outputs):
    import mlflow

    jobs = [prepare(composed(job)) for job in sweep("synthetic", [*TINY, "seed=1", outputs])]
    results = {job.settings.method.name: execute(job) for job in jobs}
    assert len(results) == 18
    for name, result in results.items():
        assert mlflow.get_run(result.run_id).info.status == "FINISHED"
        assert not result.reused and result.metrics["time/compress_s"] > 0
        tokens = 512 if name in ("full", "turboquant") else 140
        assert result.metrics["memory/tokens"] == tokens
        assert 0 <= result.metrics["planted/recall"] <= 1
    first, *others = results.values()
    assert first.metrics["prefill/computed"] == 3
    # h2o and expected_attention want the queries of the whole prompt, snapkv of its end: those prefills are done again
    assert sum(r.metrics["prefill/computed"] for r in others) <= 3 * 4


def test_what_keeps_everything_keeps_what_was_planted(results):
    for name in ("full", "turboquant"):
        assert results[name].metrics["planted/recall"] == 1
    assert results["full"].metrics["aop/max"] == 0 < results["turboquant"].metrics["aop/mean"] < 0.2


def test_the_oracle_finds_what_was_planted_and_chance_its_share(results):
    recall = {name: result.metrics["planted/recall"] for name, result in results.items()}
    aop = {name: result.metrics["aop/mean"] for name, result in results.items()}
    assert recall["oracle_mass"] >= 0.97 and recall["oracle_value"] >= 0.97
    assert recall["random"] == pytest.approx((140 - 20) / (512 - 20), abs=0.06)
    assert aop["oracle_mass"] < 0.6 * aop["random"] and aop["random"] < aop["knorm"]
    assert recall["tri"] > 0.7 > recall["random"] + 0.3
    for name in ("snapkv", "h2o"):  # the prompt looks at half of what was planted
        assert 0.4 < recall[name] < 0.8
    assert recall["knorm"] < 0.1  # what deviates is longer


def test_recall_comes_by_layer_too(results):
    import mlflow

    result = results["wavelet"]
    rows = mlflow.load_table("rows.json", run_ids=[result.run_id])
    rows = rows[rows["metric"] == "planted/recall"]
    layers = rows[rows["layer"].notna()]
    assert len(rows) == 3 * 5 and sorted(layers["layer"].astype(int)) == sorted([0, 1, 2, 3] * 3)
    assert layers["value"].mean() == pytest.approx(result.metrics["planted/recall"])
    by_layer = layers.groupby("layer")["value"].mean()
    assert by_layer[0] > 0.95 > 0.8 > by_layer[2]  # a tone hides nothing from a wavelet, bursts do


def test_recall_is_printed(results, capsys):
    show(results["random"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Planted tokens kept │ {results['random'].metrics['planted/recall']:.3f}" in shown
    assert "3 x 512 + 64 tokens of random ids" in shown


def test_runs_are_compared_with_intervals_and_the_gap(results, outputs, capsys):
    import mlflow

    settings = [*ALONE, "phase=[memory,perturbation,planted]", *TINY, outputs]
    compare(["method=oracle_value,streaming", *settings], ["method=random", *SMALL_BUDGET], gap=True)
    assert "difference to random-140-dense" in capsys.readouterr().out
    run = mlflow.get_run(results["oracle_value"].run_id)
    assert run.data.metrics["aop/mean_gap"] == pytest.approx(1)
    table = documents(results["oracle_value"])
    assert len(table) == 3 and (table["planted/recall"] > 0.9).all()


def test_the_parameters_of_the_model_decide_what_is_measured_again(outputs, results):
    settings = [*ALONE, "phase=planted", *[o for o in TINY if not o.startswith("phase.")], outputs, "method=fourier"]
    clean, noisy = (execute(prepare(composed([*settings, f"model.snr_db={decibel}"]))) for decibel in (20, -20))
    assert noisy.metrics["planted/recall"] < 0.8 * clean.metrics["planted/recall"]
    assert noisy.metrics["prefill/computed"] == 3  # not the prefills of the other model
    assert execute(prepare(composed([*settings, "model.snr_db=20"]))).run_id == clean.run_id


def test_only_planted_tokens_that_could_be_evicted_count():
    def measured(kept, planted):
        return Planted().measure(
            SimpleNamespace(
                prefill=SimpleNamespace(tokens=np.arange(20)),
                kept=kept,
                evictable=Budget(8, sinks=2, recent=4).evictable(20),
                backend=SimpleNamespace(
                    planted=lambda tokens: np.array(planted), shape=SimpleNamespace(layers=len(kept or [0, 0]))
                ),
            )
        )

    ends = [0, 1, 16, 17, 18, 19]
    kept = [np.array([[*ends, 5, 6], [*ends, 5, 9]]), np.array([[*ends, 9, 12], [*ends, 3, 4]])]
    rows = measured(kept, [0, 5, 9, 16])
    assert rows == [
        {"layer": 0, "metric": "planted/recall", "value": 0.75},
        {"layer": 1, "metric": "planted/recall", "value": 0.25},
        {"metric": "planted/recall", "value": 0.5},
    ]
    assert [row["value"] for row in measured(None, [0, 5])] == [1, 1, 1]
    assert measured(kept, [1, 17]) == []


def test_random_ids_come_from_the_vocabulary_and_the_seed():
    documents = Synthetic(tokens=100, continuation=20, count=4)
    one, again = documents.windows(None, None), documents.windows(None, None)
    assert len(one) == 4 and {w.shape for w in one} == {(120,)} and np.array_equal(one, again)
    assert len({w.tobytes() for w in [*one, *Synthetic(100, 20, 4, seed=1).windows(None, None)]}) == 8
    few = documents.windows(SimpleNamespace(get_vocab_size=lambda: 50), 7)
    assert 40 < np.max(few) < 50 and {int(w[0]) for w in few} == {7}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model=synthetic"], ["model=synthetic has no weights", "choose backend=synthetic"]),
        (["backend=synthetic"], ["can't load model=reference", "choose model=synthetic, or backend=torch"]),
        ([*ALONE], ["phase.perplexity", "model=synthetic has no weights", "choose phase=["]),
        ([*ALONE, "phase=drift"], ["phase.drift"]),
        ([*ALONE, "phase=throughput"], ["phase.throughput"]),
        ([*ALONE, "phase=retrieval"], ["phase.retrieval needs a model that predicts"]),
        (["phase=planted"], ["phase.planted", "model=reference plants none", "choose model=synthetic"]),
        ([*ALONE[:2], "phase=memory"], ["no tokenizer", "Python's language reference", "choose document=synthetic"]),
        (
            [*ALONE, "phase=memory", "document.tokens=8000"],
            ["document.tokens=8000", "8192 positions of model=synthetic"],
        ),
        ([*ALONE, "document.seed=-1"], ["document.seed=-1"]),
        ([*ALONE, "model.planted=0.9"], ["model.planted=0.9", "0.25"]),
        ([*ALONE, "model.snr_db=loud"], ["model.snr_db=loud"]),
        ([*ALONE, "+model.plant=3"], ["model.plant is not a setting of model=synthetic", "did you mean planted?"]),
    ],
)
def test_refusals_name_the_key_and_the_remedy(outputs, overrides, words):
    with pytest.raises(InputError) as refusal:
        prepare(composed([*overrides, outputs]))
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)
