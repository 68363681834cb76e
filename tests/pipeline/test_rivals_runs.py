"""Rivals, allocations and refits in runs: what they keep, what they cost, what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.calibrate import fit_kvzap
from pipeline.job import prepare
from pipeline.run import loaded
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.stages.audit import audited
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
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
    assert maps.maps.shape == (2, 2, 35) and 0 < float(maps.metadata["variance"]) <= 1
    own = ["method=ridge_kvzap", f"method.weights={path}", *ONE]
    assert run(*own).metrics["memory/tokens"] == 60
    first = prepare(composed([*small, *own])).digest
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(path.read_bytes())
    assert prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE])).digest == first
    KVzapWeights(maps.maps * 2, maps.metadata).save(moved)
    assert prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE])).digest != first
    for metadata, match in (
        ({"model": "other"}, "other weights"),
        ({"text": "Python's language reference"}, "cut from"),
    ):
        KVzapWeights(maps.maps, maps.metadata | metadata).save(moved)
        with pytest.raises(InputError, match=match):
            prepare(composed([*small, *own[:1], f"method.weights={moved}", *ONE]))


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
    with pytest.raises(RuntimeError, match="was not compressed"):
        audited(compressor, full, compress(everything, full, SharedScores(), 0))


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["budget.allocation=some"], "budget.allocation=some is not known"),
        (["budget.safeguard=2"], "budget.safeguard"),
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
