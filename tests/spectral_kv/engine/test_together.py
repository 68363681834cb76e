"""Layers scored together get what they get alone."""

import numpy as np
import pytest
import torch

from spectral_kv.backends.base import Contents, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.engine import together
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tova import Tova
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select_layers

TOKENS, BUDGET = 300, Budget(80, sinks=4, recent=16)
SCORERS = [
    Wavelet(), Fourier(), WaveletFourier(), Wavelet(signal="values"), Wavelet(sign="smoothness"), Knorm(), KeyDiff(),
    SnapKV(), Streaming(), Tova(), ExpectedAttention(), Random(), Wavelet(shuffle_seed=1), TriAttention(), WaveletTri(),
]  # fmt: skip


def views(kind, queries=64):
    rng, rope, positions = np.random.default_rng(0), Rope(10_000.0 ** -(np.arange(8) / 8)), np.arange(TOKENS)
    statistics = QueryStatistics(rng.normal(size=(5, 6, 8)) + 1j, 2 + rng.random((5, 6, 8)))

    def draw(*shape):
        return kind(rng.normal(size=shape).astype(np.float32))

    return [
        LayerView(draw(2, TOKENS, 16), draw(2, TOKENS, 16), rope, positions, BUDGET.evictable(TOKENS), index=layer,
                  seed=(0, layer), scaling=0.25, queries=draw(6, queries, 16), statistics=statistics)
        for layer in range(5)
    ]  # fmt: skip


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["all at once", "one by one"])
def test_scores_and_kept_tokens_are_those_of_layers_alone(monkeypatch, scorer, memory):
    monkeypatch.setattr(together, "_worth_it", lambda x: True)
    monkeypatch.setattr(together, "_group", lambda *args: 3 if memory else 1)
    made = views(torch.from_numpy, queries=getattr(scorer, "window", None) or TOKENS)
    got, want = together.scores(scorer, made), [scorer.score(v) for v in made]
    for one, other in zip(got, want, strict=True):
        middle = BUDGET.evictable(TOKENS)
        torch.testing.assert_close(one[:, middle], other[:, middle], rtol=1e-5, atol=1e-6)
    for one, other in zip(select_layers(got, BUDGET), select_layers(want, BUDGET), strict=True):
        assert torch.equal(one, other)


def test_layers_with_positions_of_their_own_are_not_stacked():
    made = views(torch.from_numpy)
    assert together._alike(Wavelet(), made)
    made[1].positions = made[1].positions + 1
    assert not together._alike(Wavelet(), made)


@pytest.mark.parametrize("scorer", [Wavelet(), SnapKV()], ids=str)
def test_mlx_scores_all_layers_at_once(scorer):
    mx = pytest.importorskip("mlx.core", reason="needs MLX")
    made = views(mx.array)
    assert together._worth_it(made[0].keys)
    got, want = together.scores(scorer, made), [scorer.score(v) for v in made]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


@pytest.fixture
def prompt(rng, device):
    """Two layers of a prompt of 1050 tokens, one KV head and two query heads, with all queries; and their views."""
    tokens = 1050

    def draw(heads):
        shape = (heads, tokens, 16)
        return [torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(device) for _ in range(2)]

    statistics = QueryStatistics(rng.normal(size=(2, 2, 8)) + 1j, 2 + rng.random((2, 2, 8)))
    prefill = Prefill(np.arange(tokens), draw(1), draw(1), draw(2), None)
    rope = Rope(10_000.0 ** -(np.arange(8) / 8), attention_scaling=1.3)
    made = [
        LayerView(k, v, rope, np.arange(tokens), BUDGET.evictable(tokens), scaling=0.2, index=i, queries=q,
                  statistics=statistics)
        for i, (k, v, q) in enumerate(zip(prefill.keys, prefill.values, prefill.queries, strict=True))
    ]  # fmt: skip
    return prefill, made


PASSED = [
    WaveletFourier(levels=2, alpha=0.3), ExpectedAttention(window=100),
    *(pytest.param(scorer, marks=pytest.mark.slow) for scorer in (
        Wavelet(), Wavelet(sign="smoothness"), Fourier(), WaveletFourier(levels=2), WaveletFourier(cascade=False),
        WaveletTri(), ExpectedAttention(),
    )),
]  # fmt: skip


@pytest.mark.parametrize("scorer", PASSED, ids=str)
def test_one_pass_gives_the_scores_of_the_array_code(monkeypatch, prompt, scorer):
    prefill, made = prompt
    monkeypatch.setattr(together, "_on_gpu", lambda x: True)
    got = together.in_one_pass(scorer, made[0], prefill, prefill.queries)
    want = torch.stack([scorer.score(view) for view in made])
    middle = BUDGET.evictable(want.shape[-1])
    assert got.shape == want.shape
    error = (got - want)[..., middle].abs().max() / want[..., middle].abs().max()
    assert error < (5e-4 if isinstance(scorer, (Fourier, WaveletFourier)) else 1e-5)


def test_groups_that_memory_asks_for_are_joined_in_order(monkeypatch, prompt):
    keys = prompt[0].keys
    monkeypatch.setattr(together, "_group", lambda *args: 1)
    (found,) = together._in_groups(keys, 4, lambda some: (torch.cat(keys[some]),))
    assert torch.equal(found, torch.cat(keys))


def test_no_pass_over_what_is_no_whole_prompt(monkeypatch, prompt):
    prefill, made = prompt
    monkeypatch.setattr(together, "_on_gpu", lambda x: True)
    tokens = np.arange(1050)
    assert together.in_one_pass(Knorm(), made[0], prefill, None) is None
    assert together.in_one_pass(ExpectedAttention(), made[0], prefill, None) is None, "it reads queries"
    held = Contents(prefill.keys, prefill.values, [tokens, tokens + (tokens > 5)])
    assert together.in_one_pass(Wavelet(), made[0], held, None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [4096, 5000])
@pytest.mark.parametrize("scorer", [Wavelet(), Fourier(), WaveletFourier(), ExpectedAttention()], ids=str)
def test_one_pass_on_a_gpu_keeps_the_tokens_of_the_float32_path(scorer, tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    budget, rope = Budget(512), Rope(1e6 ** -(np.arange(32) / 32))

    def draw(heads):
        shape = (heads, tokens, 64)
        return [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(6)]

    prefill = Prefill(np.arange(tokens), draw(2), draw(2), draw(4), None)
    made = [
        LayerView(k, v, rope, np.arange(tokens), budget.evictable(tokens), scaling=0.125, index=i, queries=q)
        for i, (k, v, q) in enumerate(zip(prefill.keys, prefill.values, prefill.queries, strict=True))
    ]
    found = together.in_one_pass(scorer, made[0], prefill, prefill.queries)
    got = select_layers(found, budget)
    want = select_layers([scorer.score(v) for v in made], budget)
    same = [np.intersect1d(a, b).size for x, y in zip(got, want, strict=True)
            for a, b in zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)]  # fmt: skip
    assert np.mean(same) > 0.9995 * 512
