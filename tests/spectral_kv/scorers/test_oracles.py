"""The oracles bound what any choice of tokens can recover."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from spectral_kv.calibration import QueryStatistics
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.h2o import H2O
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.oracle_mass import OracleMass
from spectral_kv.scorers.oracle_value import OracleValue
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tova import Tova
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select

KV_HEADS, GROUP, TOKENS, FUTURE, DIM, SCALING = 2, 2, 120, 20, 16, 0.25
BUDGET = Budget(40, sinks=4, recent=10)
OTHERS = [
    *(Random(seed) for seed in range(50)),
    *(Streaming(), Knorm(), KeyDiff(), SnapKV(16), Tova(), H2O(), ExpectedAttention()),
    *(Fourier(), Wavelet(), Wavelet(transform="stationary"), WaveletFourier(), WaveletTri(), TriAttention()),
    OracleValue(),
]


@pytest.fixture
def layer(rng, rope) -> LayerView:
    keys, values = rng.normal(size=(2, KV_HEADS, TOKENS, DIM)).astype(np.float32)
    values *= rng.uniform(0.1, 5.0, size=(KV_HEADS, TOKENS, 1)).astype(np.float32)
    queries = (2 * rng.normal(size=(KV_HEADS * GROUP, TOKENS + FUTURE, DIM))).astype(np.float32)
    mu = rng.normal(size=(1, KV_HEADS * GROUP, DIM // 2)) + 0.5j
    statistics = QueryStatistics(mu, np.abs(mu) + 1)
    positions, evictable = np.arange(TOKENS), BUDGET.evictable(TOKENS)
    prompt, future = queries[:, :TOKENS], queries[:, TOKENS:]
    return LayerView(
        keys, values, rope, positions, evictable, scaling=SCALING, queries=prompt, future=future, statistics=statistics
    )


def true_mass(layer: LayerView) -> np.ndarray:
    """Mean weight `[kv_heads, tokens]` that the queries to come give to a token, in float64, one query at a time."""
    mass = np.zeros((KV_HEADS, layer.tokens))
    for head in range(KV_HEADS * GROUP):
        keys = layer.keys[head // GROUP].astype(np.float64)
        for query in layer.future[head].astype(np.float64):
            row = np.array([np.exp(layer.scaling * (key @ query)) for key in keys])
            mass[head // GROUP] += row / row.sum() / (GROUP * layer.future.shape[1])
    return mass


def test_mass_equals_float64_loops(layer):
    np.testing.assert_allclose(OracleMass().score(layer), true_mass(layer), rtol=1e-4)
    np.testing.assert_allclose(OracleMass().score(layer).sum(axis=1), 1, rtol=1e-5)


def test_value_is_mass_times_the_length_of_the_value(layer):
    length = [[sum(float(x) ** 2 for x in value) ** 0.5 for value in head] for head in layer.values]
    np.testing.assert_allclose(OracleValue().score(layer), true_mass(layer) * length, rtol=1e-4)


def recovered(scorer, layer: LayerView, mass: np.ndarray) -> np.ndarray:
    """Future mass `[kv_heads]` on what a scorer keeps; the protected tokens are the same for all."""
    last = getattr(scorer, "window", None) or TOKENS
    kept = select(scorer.score(replace(layer, queries=layer.queries[:, -last:])), BUDGET)
    assert kept.shape == (KV_HEADS, BUDGET.tokens)
    return np.take_along_axis(mass, kept, axis=1).sum(axis=1)


def test_nothing_recovers_more_future_mass(layer):
    mass = true_mass(layer)
    best = recovered(OracleMass(), layer, mass)
    for scorer in OTHERS:
        margin = best - recovered(scorer, layer, mass)
        assert (margin > 0).all(), f"{scorer} recovers as much as the oracle or more"
    control = np.mean([recovered(Random(seed), layer, mass) for seed in range(50)], axis=0)
    assert (best > 1.5 * control).all()  # the bound is far from what chance gives


def test_value_keeps_more_of_what_it_maximises_than_mass_does(layer):
    worth = OracleValue().score(layer)
    by_value, by_mass = (
        np.take_along_axis(worth, select(oracle.score(layer), BUDGET), axis=1).sum(axis=1)
        for oracle in (OracleValue(), OracleMass())
    )
    assert (by_value > by_mass).all()


def test_no_set_of_tokens_recovers_more_by_enumeration(layer):
    """All 1001 ways to choose 4 of the 14 evictable tokens."""
    small = LayerView(
        layer.keys[:, :20], layer.values[:, :20], layer.rope, np.arange(20), slice(2, 16), scaling=SCALING,
        future=layer.future,
    )  # fmt: skip
    mass = true_mass(small)
    kept = select(OracleMass().score(small), Budget(10, sinks=2, recent=4))
    for kv_head in range(KV_HEADS):
        best = max(combinations(range(2, 16), 4), key=lambda chosen: mass[kv_head, list(chosen)].sum())
        assert kept[kv_head].tolist() == [0, 1, *best, 16, 17, 18, 19]


def test_the_prompt_and_its_queries_do_not_count(layer):
    score = OracleMass().score(layer)
    layer.queries, layer.statistics = -layer.queries, None
    np.testing.assert_array_equal(OracleMass().score(layer), score)
    layer.future = -layer.future
    assert (OracleMass().score(layer) != score).mean() > 0.99


@pytest.mark.parametrize("oracle", [OracleMass, OracleValue])
def test_oracles_read_the_future_and_say_so(oracle):
    assert "future" in oracle.reads and oracle().horizon == 64
    with pytest.raises(ValueError, match=r"(?<!\.)horizon=0 must be at least 1"):
        oracle(horizon=0)
