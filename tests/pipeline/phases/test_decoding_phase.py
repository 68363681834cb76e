"""A budget held while decoding, on the small model."""

import mlflow
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import spectral_kv
from pipeline.job import prepare
from pipeline.run import execute
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError

PHASE = ["phase=decoding", "phase.decoding.tokens=50", "phase.decoding.every=20", "phase.decoding.positions=5"]
EXACT = ["backend.cache_dtype=float32", "backend.device=cpu", "backend.dtype=float32", "document.count=1"]
BUDGET = spectral_kv.Budget(60, sinks=4, recent=16)


@pytest.fixture
def job(small):
    settings = [o for o in small if not o.startswith("phase.")]
    return lambda *overrides: prepare(composed([*settings, *PHASE, *overrides]))


@pytest.fixture
def phase(job):
    return lambda *overrides: execute(job(*overrides))


@pytest.mark.parametrize(
    "method", ["expected_attention", "fourier", "h2o", "keydiff", "observed_attention", "random", "snapkv", "streaming"]
)
def test_it_measures_what_the_cache_of_the_library_does(job, checkpoint, method):
    one = job(f"method={method}", *EXACT)
    metrics = execute(one).metrics
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    ids = torch.from_numpy(np.asarray(one.windows[0]))[None]
    cache, most, logits = spectral_kv.cache(model, method, BUDGET, every=20), 0, []
    with torch.no_grad():
        model(ids[:, :200], past_key_values=cache)
        before = cache.held
        for token in range(200, 250):
            logits.append(model(ids[:, token : token + 1], past_key_values=cache).logits[0, 0])
            most = max(most, cache.held)
        whole = model(ids[:, :250], use_cache=False).logits[0, 200:].log_softmax(-1)
    ours = torch.stack(logits).log_softmax(-1)
    kl = (whole.exp() * (whole - ours)).sum(-1)
    assert before == 60 and metrics["decoding/evictions"] == 2
    assert metrics["decoding/kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert metrics["decoding/kl_first"] == pytest.approx(float(kl[:20].mean()), rel=1e-3)
    assert metrics["decoding/kl_last"] == pytest.approx(float(kl[40:].mean()), rel=1e-3)
    assert metrics["decoding/most_tokens"] == most + 1 == 80  # counted before the eviction that the 80th brings about
    assert metrics["decoding/resident_mb"] == pytest.approx(80 * 2 * 2 * 2 * 16 * 4 / 1e6)


def test_the_full_cache_loses_nothing_and_grows(phase):
    metrics = phase("method=full", *EXACT).metrics
    for name in ("kl_mean", "kl_last", "aop_mean", "delta_nll_mean"):
        assert abs(metrics[f"decoding/{name}"]) < 1e-5
    assert metrics["decoding/top1"] == 1 and metrics["decoding/evictions"] == 0
    assert metrics["decoding/most_tokens"] == 250
    assert metrics["decoding/resident_mb"] == metrics["decoding/full_mb"] > 0


def test_without_evictions_the_cache_grows_and_loses_less(phase):
    held = phase("method=random").metrics
    grown = phase("method=random", "phase.decoding.every=null").metrics
    assert (grown["decoding/most_tokens"], grown["decoding/evictions"]) == (110, 0)
    assert (held["decoding/most_tokens"], held["decoding/evictions"]) == (80, 2)
    assert held["decoding/resident_mb"] < grown["decoding/resident_mb"] < held["decoding/full_mb"]
    assert held["decoding/tok_s"] > 0 and held["decoding/full_tok_s"] > 0


def test_stretches_are_steps_in_mlflow(phase):
    result = phase("method=snapkv", "storage=turboquant_4bit")
    client = mlflow.MlflowClient()
    for metric in ("decoding/kl", "decoding/aop", "decoding/delta_nll"):
        history = client.get_metric_history(result.run_id, metric)
        assert [m.step for m in history] == [20, 40, 50]
    history = client.get_metric_history(result.run_id, "decoding/aop")
    assert [history[0].value, history[-1].value] == pytest.approx(
        [result.metrics["decoding/aop_first"], result.metrics["decoding/aop_last"]]
    )
    assert min(m.value for m in history) > 0


@pytest.mark.parametrize("method", ["h2o", "oracle_mass", "wavelet_tri"])
def test_every_kind_of_method_holds_its_budget(phase, method):
    metrics = phase(
        f"method={method}", "document.count=1", "method.horizon=10" if "oracle" in method else "seed=0"
    ).metrics
    assert metrics["decoding/most_tokens"] == 80 and metrics["decoding/kl_mean"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phase.decoding.every=0", "phase.decoding.every=0 must be at least 1"),
        ("phase.decoding.tokens=0", "phase.decoding.tokens=0 must be at least 1"),
        ("phase.decoding.positions=21", "phase.decoding.positions=21 are more than the 20 tokens of a stretch"),
        ("phase.decoding.tokens=5000", "phase.decoding needs 5000 tokens after the prompt"),
    ],
)
def test_what_can_not_be_is_one_sentence(job, override, message):
    with pytest.raises(InputError, match=message):
        job(override)
