"""Drift and throughput on the small model; the other phases are tested with the runs."""

import pytest
import torch

from pipeline.phases.match import matching_prefix

DRIFT = ["phase=drift", "phase.drift.turns=3", "phase.drift.tokens=20", "phase.drift.positions=10"]
LONG = ["document.continuation=64"]
SPEED = ["phase=throughput", "phase.throughput.tokens=6", "phase.throughput.repeats=2", "phase.throughput.warmup=1"]


@pytest.fixture
def phase(small):
    """Execute with one phase; the overrides of the others would not apply."""
    from pipeline.job import prepare
    from pipeline.run import execute
    from pipeline.settings.compose import composed

    settings = [o for o in small if not o.startswith("phase.")]
    return lambda *overrides: execute(prepare(composed([*settings, *LONG, *overrides])))


def test_the_full_cache_does_not_drift(phase):
    metrics = phase(*DRIFT, "method=full").metrics
    for metric in ("drift/aop", "drift/delta_nll"):
        for name in ("first", "last", "slope"):
            assert abs(metrics[f"{metric}_{name}"]) < 1e-12


def test_the_first_turn_of_a_cache_that_is_compressed_once_is_that_of_one_compressed_again(phase):
    again = phase(*DRIFT, "method=tri").metrics
    once = phase(*DRIFT, "method=tri", "phase.drift.policy=once").metrics
    assert once["drift/aop_first"] == again["drift/aop_first"] > 0
    assert once["drift/aop_last"] != again["drift/aop_last"]


def test_turns_are_steps_in_mlflow_and_the_slope_is_that_of_a_line_through_them(phase):
    import mlflow

    result = phase(*DRIFT, "method=random")
    history = mlflow.MlflowClient().get_metric_history(result.run_id, "drift/aop")
    assert [m.step for m in history] == [1, 2, 3]
    values = [m.value for m in history]
    assert result.metrics["drift/aop_first"] == pytest.approx(values[0])
    assert result.metrics["drift/aop_last"] == pytest.approx(values[2])
    assert result.metrics["drift/aop_slope"] == pytest.approx((values[2] - values[0]) / 2)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "expected_attention", "oracle_mass", "wavelet_tri"])
def test_every_kind_of_method_is_compressed_again(phase, method):
    assert phase(*DRIFT, f"method={method}", "storage=turboquant_4bit").metrics["drift/aop_last"] > 0


def test_throughput_compares_with_its_own_baseline(phase):
    result = phase(*SPEED, "method=full")
    metrics = result.metrics
    assert metrics["throughput/speedup_least"] <= metrics["throughput/speedup"] <= metrics["throughput/speedup_most"]
    assert 0.2 < metrics["throughput/speedup"] < 5
    assert metrics["throughput/tok_s"] > 0 and metrics["throughput/compress_s"] > 0
    assert phase(*SPEED, "method=random", "phase.throughput.batch=3").metrics["throughput/tok_s"] > 0


def test_the_full_cache_says_what_it_says_and_another_one_something_else(phase):
    match = ["phase=match", "phase.match.tokens=6", "phase.match.documents=2"]
    full = phase(*match, "method=full")
    assert full.metrics["match/tokens"] == 1 and full.metrics["match/prefix"] == 6
    assert 0 <= full.metrics["match/noise_floor_tokens"] <= 1
    few = phase(*match, "method=knorm", "budget.tokens=20", "budget.recent=4", "budget.sinks=0").metrics
    assert few["match/tokens"] < 1 and few["match/prefix"] < 6
    assert few["match/noise_floor_tokens"] == full.metrics["match/noise_floor_tokens"]  # of the full cache either way


def test_the_matching_prefix_ends_at_the_first_difference():
    assert matching_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert matching_prefix([1, 2], [1, 2]) == 2
    assert matching_prefix([5], [6]) == 0


def test_a_batch_decodes_what_one_sequence_decodes(backend, rng):
    from spectral_kv.storage.dense import Dense

    prefill = backend.prefill(rng.integers(2, 8000, size=80), observe=1)
    kept = [torch.arange(0, 80, 2).repeat(2, 1)] * 2
    one, three = (backend.compress(prefill, kept, Dense(), batch) for batch in (1, 3))
    assert three.nbytes == 3 * one.nbytes
    assert backend.generate(one, 7, 10) == backend.generate(three, 7, 10)
