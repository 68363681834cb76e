"""Two models whose runs are made up, so that what agrees and what doesn't is known."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.paper.__main__ import regenerate
from pipeline.paper.agreement import agreement
from pipeline.paper.claims import SUPPORTED, judge
from pipeline.paper.figures import _few
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.models import ModelResults, changes, established, over_models, runs_table
from pipeline.paper.sections import _preset, spared
from pipeline.settings.errors import InputError

RANKED = ("wavelet", "wavelet_tri", "wavelet_fourier", "fourier", "tri", "turboquant")
CLAIM = {
    "id": "x", "source": "Key finding 9", "statement": "a is low", "metric": "aop/mean",
    "tests": [{"test": "lowest", "metric": "aop/mean", "method": "wavelet", "among": ["fourier"]}],
}  # fmt: skip


def noise(seed: int, documents: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, documents)


@pytest.fixture
def model(made):
    """Makes a model whose methods have a mean AOP in a given order, 0.5 apart, and a KL that is the same for all."""

    def make(title: str, order: tuple[str, ...], documents: int) -> ModelResults:
        runs = [
            made(
                method,
                {
                    "aop/mean": list(1 + 0.5 * rank + noise(rank, documents)),
                    "ppl/kl": [0.5] * documents,
                    "memory/ratio": [8.0 if method != "turboquant" else 3.5] * documents,
                },
            )
            for rank, method in enumerate(order)
        ]
        section = MeasuredSection("paper", "The published comparison", documents, [], runs)
        return ModelResults(
            title, "windows of a text", [section], judge([CLAIM], {"paper": {r.method: r for r in runs}})
        )

    return make


def test_orders_that_are_the_same_or_reversed():
    ours, theirs = (np.arange(6)[:, None] + noise(seed, 6 * n).reshape(6, n) for seed, n in ((0, 20), (1, 8)))
    same, reverse = agreement(ours, theirs), agreement(ours, -theirs)
    assert same.tau.mean == 1 and reverse.tau.mean == -1
    assert same.p == reverse.p == pytest.approx(2 / len(list(permutations(range(6)))))  # this order, or its reverse
    assert (same.tau.low, same.tau.high) == (1, 1)


def test_the_interval_is_wide_where_windows_decide_the_order():
    """Two methods that differ by less than a window's noise may stand either way round; eight windows tell less."""
    ours = np.array([0.0, 0.02, 5.0, 6.0])[:, None] + noise(2, 4 * 20).reshape(4, 20)
    theirs = np.arange(4)[:, None] + noise(3, 4 * 20).reshape(4, 20)
    found = agreement(ours, theirs)
    assert found.tau.low == pytest.approx(2 / 3) and found.tau.high == 1  # one of six pairs may turn
    assert np.isnan(agreement(ours[:, :4], theirs).tau.low)  # too few windows


def test_ties_give_no_agreement():
    assert np.isnan(agreement(np.ones((3, 8)), np.arange(24.0).reshape(3, 8)).tau.mean)


def test_pairs_that_are_sure_on_both():
    methods, ours = ["a", "b", "c"], np.array([0.0, 1.0, 1.02])[:, None] + noise(4, 60).reshape(3, 20)
    theirs = np.array([0.5, 1.5, -1.0])[:, None] + noise(5, 30).reshape(3, 10)
    pairs = established(ours, theirs, methods)
    assert pairs.alike == [("a", "b")] and pairs.opposite == [("a", "c")]  # b and c can't be told apart on the first
    constant = established(np.array([[0.0] * 8, [1.0] * 8]), np.array([[0.0] * 8, [1.0] * 8]), ["a", "b"])
    assert constant.alike == constant.opposite == []  # the same in every document says nothing of others


def test_what_differs_is_said(model):
    one = model("first", RANKED, 16)
    other = model("second (Q4_1 weights)", RANKED[::-1], 8)
    over = over_models([one, other])
    matrix = over.matrix.cells.iloc[0]
    assert (matrix["first"], matrix["second (Q4_1 weights)"], matrix["alike"]) == (
        "supported", "contradicted", "no"
    )  # fmt: skip
    ranks = over.tables[1]
    assert ranks.numbers["metric"].tolist() == ["aop/mean"]  # all KL are ties, and bytes are counted
    assert ranks.numbers["tau"].item() == -1 and ranks.numbers["pairs_opposite"].item() == 15
    verdicts, aop = changes([one, other])[:2]
    assert verdicts.startswith("**Verdicts** of first and second (Q4_1 weights): 0 of 1 alike. Others: Key finding 9")
    assert verdicts.endswith(" (supported, contradicted).")
    assert "0 agree and 15 are opposite (lower first on first: WaveletKV and WaveletTriAttn;" in aop
    table = next(t for t in over.tables if t.name == "models_perturbation")
    assert table.cells["method"].tolist()[0] == "WaveletKV" and table.cells["published"].tolist()[0] == "0.484"
    assert table.numbers["first"].iloc[0] == pytest.approx(1, abs=0.1)
    assert table.numbers["second (Q4_1 weights)"].iloc[0] == pytest.approx(3.5, abs=0.1)


def test_models_that_agree_say_so(model):
    same = over_models([model("first", RANKED, 16), model("second", RANKED, 8)])
    assert same.matrix.cells["alike"].tolist() == ["yes"]
    assert same.models[0].verdicts[0].verdict == SUPPORTED
    assert same.tables[1].numbers[["tau", "pairs_alike"]].to_numpy().tolist() == [[1, 15]]


def test_a_claim_that_one_model_lacks_is_a_dash(model):
    one, other = model("first", RANKED, 16), model("second", RANKED, 8)
    other.verdicts.clear()
    cells = over_models([one, other]).matrix.cells.iloc[0]
    assert cells["second"] == cells["alike"] == "-"


def test_every_run_is_a_line(model):
    table = runs_table([model("first", RANKED, 16), model("second", RANKED, 8)])
    assert len(table) == 12 and set(table["model"]) == {"first", "second"}
    first = table.iloc[0]
    assert first["documents"] == 16 and first["hash.document"] == "d" and first["run"] == "run-wavelet"
    assert first["aop/mean_low"] < first["aop/mean"] < first["aop/mean_high"]


def test_a_model_is_named_once(tmp_path):
    for models in (["smollm2", "smollm2"], ["reference", ""]):
        with pytest.raises(InputError, match=r"--models names '.*' twice or no model: write each"):
            regenerate(["paper"], [f"outputs={tmp_path}"], models=models)


def test_a_model_without_maps_does_without_the_method_that_reads_them():
    (narrowed,) = spared("rivals", ["model=smollm2_360m"])
    whole = _preset("rivals")["hydra"]["sweeper"]["params"]["method"].split(",")
    assert narrowed == f"method={','.join(m for m in whole if m != 'ridge_kvzap')}"
    assert spared("rivals", []) == spared("rivals", ["model=smollm2"]) == []
    assert spared("rivals", ["model=smollm2_360m", "+model.kvzap=/maps"]) == []
    assert spared("rivals", ["model=smollm2_360m", "method=kvzip"]) == spared("paper", ["model=smollm2_360m"]) == []


def test_of_many_layers_a_few_get_a_tick():
    assert list(_few(8)) == list(range(8)) and list(_few(30)) == list(range(0, 30, 3)) and len(_few(128)) <= 10


def test_the_command_of_a_section_names_the_model_and_no_place():
    taken = ["model=smollm2", "outputs=/x", "tracking.uri=sqlite:///x", "force=true"]
    section = MeasuredSection("paper", "The published comparison", 17, ["document.count=17"], [], taken)
    assert section.command == "python -m pipeline experiment=paper document.count=17 model=smollm2"
