"""NumPy, torch and MLX arrays of the same numbers give the same scores, kept tokens and codes."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_log_mass, attention_mass, attention_output, attention_weights
from spectral_kv.calibration import QueryStatistics
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import kl_divergence, log_softmax, negative_log_likelihood, top1_agreement
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.h2o import H2O
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.observed_attention import ObservedAttention
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
from spectral_kv.selection import Budget, select, select_layers
from spectral_kv.storage.turboquant import TurboQuantStorage
from spectral_kv.transforms.fourier import lowpass
from spectral_kv.transforms.wavelet import wavedec
from spectral_kv.xp import Array, namespace, stable_order

KV_HEADS, QUERY_HEADS, TOKENS, FUTURE, DIM = 2, 4, 397, 16, 16  # 397: no power of two divides it
BUDGET = Budget(100, sinks=4, recent=32)
SCORERS = {
    "fourier": Fourier(),
    "wavelet": Wavelet(),
    "wavelet-stationary": Wavelet(transform="stationary"),
    "wavelet-periodization": Wavelet(mode="periodization"),
    "wavelet_fourier": WaveletFourier(),
    "wavelet_fourier-flat": WaveletFourier(cascade=False),
    "wavelet_tri": WaveletTri(),
    "tri": TriAttention(),
    "tri-max": TriAttention(aggregation="max"),
    "tri-unrotated": TriAttention(path="unrotated"),
    "knorm": Knorm(),
    "keydiff": KeyDiff(),
    "snapkv": SnapKV(window=40),
    "tova": Tova(),
    "observed_attention": ObservedAttention(),
    "h2o": H2O(),
    "expected_attention": ExpectedAttention(),
    "oracle_mass": OracleMass(FUTURE),
    "oracle_value": OracleValue(FUTURE),
    "random": Random(3),
    "streaming": Streaming(),
}
each_scorer = pytest.mark.parametrize("name", SCORERS)


@pytest.fixture(params=["torch", "mlx"])
def make(request) -> Callable[[np.ndarray], Array]:
    """Brings a NumPy array to the other kind."""
    return torch.from_numpy if request.param == "torch" else pytest.importorskip("mlx.core").array


def close(found: Array, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal within `tolerance` of the spread of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.ptp(expected))


def walk(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """`[heads, tokens, dim]` that drifts, jitters and jumps, around a mean of its own, as keys do."""
    heads, tokens, dim = shape
    drift = 0.1 * np.cumsum(rng.normal(size=shape), axis=1)
    jumps = np.repeat(rng.normal(size=(heads, -(-tokens // 50), dim)), 50, axis=1)[:, :tokens]
    return (drift + jumps + 0.3 * rng.normal(size=shape) + 2 * rng.normal(size=(heads, 1, dim))).astype(np.float32)


def view(name: str, make: Callable[[np.ndarray], Array] = np.asarray, dtype: str = "float32") -> LayerView:
    """The layer that scorer `name` would see, always of the same numbers; keys and values are cached as `dtype`."""
    rng = np.random.default_rng(5)
    rope = Rope(10_000.0 ** -(np.arange(DIM // 2) / (DIM // 2)))
    keys = rope.rotate(walk(rng, KV_HEADS, TOKENS, DIM), np.arange(TOKENS)).astype(dtype)
    values = walk(rng, KV_HEADS, TOKENS, DIM).astype(dtype)
    queries = rope.rotate(walk(rng, QUERY_HEADS, TOKENS + FUTURE, DIM), np.arange(TOKENS + FUTURE)) / 2
    mu = rng.normal(size=(1, QUERY_HEADS, DIM // 2)) + 1j * rng.normal(size=(1, QUERY_HEADS, DIM // 2))
    statistics = QueryStatistics(mu, np.abs(mu) + rng.random(mu.shape))
    last = getattr(SCORERS.get(name), "window", None) or TOKENS
    return LayerView(
        make(keys), make(values), rope, np.arange(TOKENS), BUDGET.evictable(TOKENS), scaling=DIM**-0.5, seed=(1, 0),
        queries=make(queries[:, TOKENS - last : TOKENS].copy()), future=make(queries[:, TOKENS:].copy()),
        statistics=statistics,
    )  # fmt: skip


def same_choice(scores: np.ndarray, kept: np.ndarray, other: np.ndarray) -> None:
    """At least 99 % of each head's tokens, and all of them where the last one in is clearly better than the next."""
    quota = BUDGET.tokens - BUDGET.sinks - BUDGET.recent
    for head in range(KV_HEADS):
        overlap = len(set(kept[head].tolist()) & set(other[head].tolist())) / BUDGET.tokens
        middle = -np.sort(-scores[head, BUDGET.evictable(TOKENS)])
        clear = middle[quota - 1] - middle[quota] > 1e-5 * np.ptp(middle)
        assert overlap == 1 if clear else overlap >= 0.99


@each_scorer
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_and_kept_tokens_agree(name, dtype, make):
    scorer = SCORERS[name]
    expected = scorer.score(view(name, dtype=dtype))
    layer = view(name, make, dtype)
    found = scorer.score(layer)
    assert namespace(found) is namespace(layer.keys)
    assert expected.shape == (KV_HEADS, TOKENS) and np.isfinite(expected).all()
    close(found, expected)
    same_choice(expected, select(expected, BUDGET), np.asarray(select(found, BUDGET)))


@each_scorer
def test_a_view_of_a_larger_array_scores_as_a_copy(name):
    """What backends hand over is often a slice or a transposed tensor."""
    scorer, layer = SCORERS[name], view(name, torch.from_numpy)
    expected = scorer.score(layer)
    strided = view(name, lambda x: torch.from_numpy(x).transpose(0, 1).contiguous().transpose(0, 1))
    assert not strided.keys.is_contiguous()
    torch.testing.assert_close(scorer.score(strided), expected, rtol=1e-5, atol=1e-5)


def test_one_choice_for_all_layers_agrees(make):
    names = ["wavelet", "knorm", "tova"]
    budget = Budget(BUDGET.tokens, BUDGET.sinks, BUDGET.recent, "per_head")
    expected = select_layers([SCORERS[n].score(view(n)) for n in names], budget)
    found = select_layers([SCORERS[n].score(view(n, make)) for n in names], budget)
    for kept, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(np.asarray(other), kept)


def test_transforms_agree(make):
    x = walk(np.random.default_rng(1), KV_HEADS, TOKENS, DIM)
    close(lowpass(make(x), 0.25, 0.5), lowpass(x, 0.25, 0.5))
    for transform in ("decimated", "stationary"):
        for mode in ("symmetric", "periodization"):
            pairs = zip(*(wavedec(y, "db4", 4, mode, transform) for y in (make(x), x)), strict=True)
            for found, expected in pairs:
                close(found, expected)


def test_attention_and_its_metrics_agree(make):
    layer, other = view("h2o"), view("h2o", make)
    for causal in (True, False):
        expected, found = (attention_weights(y.queries, y.keys, y.scaling, causal) for y in (layer, other))
        close(found, expected)
        close(attention_mass(found, KV_HEADS), attention_mass(expected, KV_HEADS))
    log_masses = [attention_log_mass(y.queries, y.keys, y.scaling) for y in (layer, other)]
    close(log_masses[1], log_masses[0])
    full = [attention_output(y.queries, y.keys, y.values, y.scaling) for y in (layer, other)]
    kept = [attention_output(y.queries, y.keys[:, 300:], y.values[:, 300:], y.scaling) for y in (layer, other)]
    close(full[1], full[0])
    close(attention_output_perturbation(kept[1], full[1]), attention_output_perturbation(kept[0], full[0]))


def test_prediction_metrics_agree(make):
    rng = np.random.default_rng(2)
    logits = (4 * rng.normal(size=(2, 30, 500))).astype(np.float32)
    logits[1, :10] = logits[0, :10] + 0.01
    targets = rng.integers(0, 500, size=30)
    full, compressed = (log_softmax(make(x)) for x in logits)
    exact = [log_softmax(x) for x in logits]
    close(negative_log_likelihood(full, make(targets)), negative_log_likelihood(exact[0], targets))
    close(kl_divergence(full, compressed), kl_divergence(*exact))
    agreement = top1_agreement(*logits)
    assert 0 < agreement.mean() < 1
    np.testing.assert_array_equal(np.asarray(top1_agreement(full, compressed)), agreement)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_storage_agrees_through_store_append_and_take(bits, make):
    """Kept tokens are stored, 150 are fed one by one, a random 120 are kept of what is there then."""
    rng = np.random.default_rng(7)
    keys, values = (walk(rng, 8, TOKENS, 64).astype(np.float16)[None] for _ in range(2))
    storage = TurboQuantStorage(bits, bits, sinks=4, recent=32, flush=16)
    scores = rng.random((1, 8, TOKENS), dtype=np.float32)
    stages = {}
    for name, kind in {"numpy": np.asarray, "other": make}.items():
        stored = [storage.store(kind(keys[:, :, :247].copy()), kind(values[:, :, :247].copy()), layer=3)]
        grown = stored[0]
        for token in range(247, TOKENS):
            grown = grown.append(*(kind(x[:, :, token : token + 1].copy()) for x in (keys, values)))
        kept = namespace(grown.recent[0]).sort(stable_order(kind(scores))[..., :120], axis=-1)  # in its own index type
        stages[name] = [*stored, grown, grown.take(kept)]
    for ours, theirs, tokens in zip(*stages.values(), (247, TOKENS, 120), strict=True):
        assert ours.tokens == theirs.tokens == tokens
        assert ours.nbytes == theirs.nbytes
        for a, b in ((ours.coded.keys, theirs.coded.keys), (ours.coded.values, theirs.coded.values)):
            assert np.mean(np.asarray(a.codes) != np.asarray(b.codes)) < 1e-4
        for a, b, x in zip(ours.load(), theirs.load(), (keys, values), strict=True):
            assert namespace(b) is namespace(make(np.zeros(1))) and np.asarray(b).dtype == np.float16
            assert np.mean(np.abs(np.asarray(b) - a) > 2e-3 * np.ptp(x)) < 1e-4


@pytest.mark.parametrize("name", ["h2o", "observed_attention", "expected_attention"])
def test_what_is_gathered_in_chunks_agrees(name, make):
    scorer, gathered = SCORERS[name], None
    layer, expected = view(name, make), SCORERS[name].score(view(name))
    for start in range(0, TOKENS, 64):
        stop = min(start + 64, TOKENS)
        keys, values = layer.keys[:, :stop], layer.values[:, :stop]
        more = {"scaling": layer.scaling, "queries": layer.queries[:, start:stop], "gathered": gathered}
        gathered = scorer.gather(LayerView(keys, values, layer.rope, np.arange(stop), slice(None), **more))
    close(scorer.score(replace(layer, queries=None, gathered=gathered)), expected)
