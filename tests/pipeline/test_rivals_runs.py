"""Rivals, allocations and refits in runs: what they keep, what they cost, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.calibrate import fit_kvzap
from pipeline.compare import compare
from pipeline.job import prepare
from pipeline.run import loaded
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.show.summary import show
from pipeline.stages.audit import audited
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
from pipeline.store.search import show as side_by_side
from spectral_kv.compressor import Compressor, SharedScores
from spectral_kv.scorers.ridge_kvzap import KVzapWeights

EVERY = ["document.count=1", "phase=[memory,perturbation,perplexity,drift,fidelity,kept,spectra,match,decoding]"]
EVERY += ["phase.drift.turns=2", "phase.drift.tokens=20", "phase.drift.positions=8", "phase.match.tokens=5"]
EVERY += ["phase.decoding.tokens=20", "phase.decoding.every=8", "phase.decoding.positions=4"]
ONE = ["document.count=1"]
TOKEN = 2 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, dim, bytes


@pytest.mark.parametrize(
    "allocation", ["head", *(pytest.param(other, marks=pytest.mark.slow) for other in ("layer", "global"))]
)
def test_every_phase_measures_caches_whose_heads_differ(run, allocation):
    metrics = run("method=snapkv", "method.window=8", f"budget.allocation={allocation}", *EVERY).metrics
    assert metrics["memory/tokens"] == 60 and metrics["memory/bytes"] == 60 * TOKEN
    assert metrics["audit/evicted_tokens"] == 4 * 140 and metrics["audit/freed_mb"] == 140 * TOKEN / 1e6
    assert 0 < metrics["aop/mean"] < 1.5 and np.isfinite(metrics["drift/aop_slope"])
    assert metrics["decoding/evictions"] == 2


@pytest.mark.slow
def test_allocations_keep_other_tokens(run):
    found = {
        run("method=knorm", f"budget.allocation={a}", *ONE).metrics["aop/mean"]
        for a in ("uniform", "head", "global", "layer")
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    "method", ["defensive", "kvzip_plus", *(pytest.param(m, marks=pytest.mark.slow) for m in ("compactor", "kvzip"))]
)
def test_rivals_run_and_say_what_they_cost(run, method):
    found = run(f"method={method}", "budget.allocation=global", *ONE)
    assert found.metrics["memory/tokens"] == 60
    assert ("time/repetition_s" in found.metrics) == method.startswith("kvzip")
    if method.startswith("kvzip"):
        assert found.metrics["time/repetition_prefills"] > 0.2 and "repetition" in found.reads


def test_ridge_kvzap_is_fitted_kept_with_its_model_and_known_by_its_numbers(run, small, tmp_path):
    fit = [*small, "document=book", "document.title=northanger_abbey", "method.chunk=100", "document.count=2"]
    path = fit_kvzap(fit, tmp_path / "maps.safetensors")
    maps = KVzapWeights.load(path)
    assert maps.metadata["texts"] == "northanger_abbey"
    assert maps.maps.shape == (2, 2, 35) and 0 < float(maps.metadata["variance"]) <= 1
    own = ["method=ridge_kvzap", f"method.weights={path}", *ONE]
    assert run(*own).metrics["memory/tokens"] == 60
    first = prepare(composed([*small, *own])).digest
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(path.read_bytes())
    assert prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE])).digest == first
    KVzapWeights(maps.maps * 2, maps.metadata).save(moved)
    assert prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE])).digest != first
    needles = ["document=needles", "document.tokens=400", "document.continuation=100"]
    novel = ["document=book", "document.title=northanger_abbey"]
    for metadata, documents, match in (
        ({"model": "other"}, [], "other weights"),
        ({"texts": "Python's language reference"}, [], "cut from"),
        ({"texts": "Python's language reference"}, needles, "fitted to Python's language reference, which is also"),
        ({}, novel, "fitted to northanger_abbey, which is also"),
    ):
        KVzapWeights(maps.maps, maps.metadata | metadata).save(moved)
        with pytest.raises(InputError, match=match):
            prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE, *documents]))
    mixed = {name: value for name, value in maps.metadata.items() if name != "texts"} | {"text": "mixed text"}
    KVzapWeights(maps.maps, mixed).save(moved)  # of before texts were written
    with pytest.raises(InputError, match="fitted to northanger_abbey, which is also"):
        prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE, *novel]))


@pytest.mark.parametrize(
    "kind, allocation", [("bias", "head"), pytest.param("bias_values", "uniform", marks=pytest.mark.slow)]
)
def test_a_refit_changes_what_is_read_and_counts_its_bytes(run, kind, allocation):
    plain = run("method=random", f"budget.allocation={allocation}", *EVERY).metrics
    refit = ["refit.queries=40", "refit.value_strength=0.1"]
    fitted = run("method=random", f"budget.allocation={allocation}", f"refit={kind}", *refit, *EVERY).metrics
    assert fitted["memory/bytes"] == plain["memory/bytes"] + 4 * 60 * 4  # a float32 for every token of a layer and head
    assert fitted["aop/mean"] != plain["aop/mean"]
    assert fitted["mass/mean"] == plain["mass/mean"]  # of the tokens, whatever they are given


def test_what_a_refit_takes_is_within_a_budget_of_bytes(small):
    """A token and head takes 64 bytes, and 4 of a bias."""
    own = ["method=random", "budget.ratio=0.5", *ONE]
    tokens = [prepare(composed([*small, *own, *more])).budget.tokens for more in ([], ["refit=bias"])]
    assert tokens == [100, 100 * 64 // 68]


def test_runs_that_differ_in_allocation_or_refit_can_be_told_apart(small, run, capsys):
    """On the screen, in finished runs side by side, in the name of a logged difference."""
    own = ["method=random", "document.count=1"]
    plain, other = run(*own), run(*own, "budget.allocation=layer", "refit=bias", "refit.queries=40")
    assert (plain.further, other.further) == ([], ["layer", "bias"])
    show(other)
    outputs = next(o for o in small if o.startswith("outputs="))
    side_by_side([outputs], [])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Random, 60 tokens, layer, bias, dense" in printed
    assert "uniform" in printed and "allocation" in printed and "refit" in printed
    compare([*small, *own], [*own, "budget.tokens=60", "budget.recent=16", "budget.allocation=layer"], gap=False)
    assert "difference to random-60-dense-layer" in capsys.readouterr().out


def test_packed_tokens_are_refitted_too(run):
    packed = ["method=random", "storage=turboquant_4bit", "storage.recent=8", "budget.allocation=global", *ONE]
    plain, fitted = (run(*packed, f"refit={kind}").metrics for kind in ("none", "bias_values"))
    assert plain["memory/bytes"] < 60 * TOKEN and fitted["aop/mean"] != plain["aop/mean"]


def test_gone_everywhere_counts_what_no_head_keeps(small):
    """Streaming keeps the same tokens everywhere; the full cache loses none."""
    job = prepare(composed([*small, "method=streaming", *ONE]))
    _, backend = loaded(job.settings, job.checkpoint)
    full = FullRun(backend, job.windows[0], 200, 0)
    compressor = Compressor(backend, job.settings.method.scorer, job.budget, job.settings.storage)
    compressed = compress(compressor, full, SharedScores(), 0)
    assert audited(compressor, full, compressed)["kept/gone_everywhere"] == pytest.approx(140 / 200)
    everything = replace(compressor, scorer=None)
    assert audited(everything, full, compress(everything, full, SharedScores(), 0))["kept/gone_everywhere"] == 0
    looked_at = FullRun(backend, job.windows[0], 200, 150)  # as a method left it that wants the last 150 queries
    looked_at.peak = 10**6
    alone, shared = (audited(compressor, of, compressed) for of in (full, looked_at))
    assert shared["audit/prefill_mb"] == alone["audit/prefill_mb"] and "audit/prefill_peak_mb" not in shared
    full.peak = 10**6
    assert audited(compressor, full, compressed)["audit/prefill_peak_mb"] == 1
    with pytest.raises(RuntimeError, match="was not compressed"):
        audited(compressor, full, compress(everything, full, SharedScores(), 0))


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["budget.allocation=some"], "budget.allocation=some is not known"),
        (["budget.safeguard=2"], "budget.safeguard"),
        (["budget.allocation=global", "budget.sinks=0", "budget.recent=0"], "budget.recent=0 protect no token"),
        (["budget.allocation=head", "budget.selection=per_head"], "leave one of the two"),
        (["budget.allocation=head", "backend=mlx"], "choose layer or uniform"),
        (["refit=bias", "backend=mlx"], "choose refit=none"),
        (["refit=bias", "refit.queries=0"], "refit.queries=0"),
        (["method=kvzip", *EVERY], "phase.drift brings"),
        (["method=ridge_kvzap"], "pipeline.calibrate --kvzap"),
        (["method=ridge_kvzap", "method.weights=/nowhere"], "is not a file"),
        (
            ["method=defensive", "backend=synthetic", "model=synthetic", "document=synthetic"],
            "repeats its prompt or has a W_O",
        ),
    ],
)
def test_what_can_not_be_is_one_sentence(small, overrides, match):
    own = [o for o in small if not (o.startswith("model") and "model=synthetic" in overrides)]
    with pytest.raises(InputError, match=match):
        prepare(composed([*own, *overrides]))
