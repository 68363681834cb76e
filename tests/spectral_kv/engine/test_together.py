"""Layers scored together get what they get alone."""

import numpy as np
import pytest
import torch

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
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select_layers

TOKENS, BUDGET = 300, Budget(80, sinks=4, recent=16)
SCORERS = [
    Wavelet(), Fourier(), WaveletFourier(), Wavelet(signal="values"), Wavelet(sign="smoothness"), Knorm(), KeyDiff(),
    SnapKV(), Streaming(), Tova(), ExpectedAttention(), Random(), Wavelet(shuffle_seed=1),
]  # fmt: skip


def views(kind, queries=64):
    rng, rope, positions = np.random.default_rng(0), Rope(10_000.0 ** -(np.arange(8) / 8)), np.arange(TOKENS)

    def draw(*shape):
        return kind(rng.normal(size=shape).astype(np.float32))

    return [
        LayerView(draw(2, TOKENS, 16), draw(2, TOKENS, 16), rope, positions, BUDGET.evictable(TOKENS), index=layer,
                  seed=(0, layer), scaling=0.25, queries=draw(6, queries, 16))
        for layer in range(5)
    ]  # fmt: skip


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
@pytest.mark.parametrize("memory", [1.0, 0.0], ids=["all at once", "one by one"])
def test_scores_and_kept_tokens_are_those_of_layers_alone(monkeypatch, scorer, memory):
    monkeypatch.setattr(together, "_worth_it", lambda x: True)
    monkeypatch.setattr(together, "_banded", lambda *args: None)
    monkeypatch.setattr(together, "_group", lambda views: 3 if memory else 1)
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
    assert not together._alike(WaveletTri(), made), "query statistics are those of one layer"
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scorer", [Wavelet(), Fourier()], ids=str)
@pytest.mark.parametrize("tokens", [4096, 5000])
def test_one_pass_on_a_gpu_keeps_the_tokens_of_the_float32_path(scorer, tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    budget, rope = Budget(512), Rope(1e6 ** -(np.arange(32) / 32))
    keys = [torch.randn(2, tokens, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    made = [
        LayerView(k, k, rope, np.arange(tokens), budget.evictable(tokens), scaling=0.125, index=i)
        for i, k in enumerate(keys)
    ]
    assert together._banded(scorer, made) is not None
    got = select_layers(together.scores(scorer, made), budget)
    want = select_layers([scorer.score(v) for v in made], budget)
    same = [np.intersect1d(a, b).size for x, y in zip(got, want, strict=True)
            for a, b in zip(x.cpu().numpy(), y.cpu().numpy(), strict=True)]  # fmt: skip
    assert np.mean(same) > 0.9999 * 512
