"""Spectral scores by matrix products on a CPU: what the scorers' own transforms give, and the same kept tokens."""

import numpy as np
import pytest
import torch

from spectral_kv.backends.base import Contents, Prefill
from spectral_kv.calibration import QueryStatistics
from spectral_kv.engine import together
from spectral_kv.engine.products import STRETCH, TILE, deviations, energies, products
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select_layers
from spectral_kv.xp import to_numpy

ROPE = Rope(10_000.0 ** -(np.arange(8) / 8), attention_scaling=1.3)
SCORERS = [Fourier(), Wavelet(), Wavelet(wavelet="haar", levels=3), WaveletTri(level_decay=0.8)]


def drawn(rng, tokens: int, dtype: torch.dtype = torch.float32, layers: int = 2, heads: int = 2) -> list[torch.Tensor]:
    """Keys whose channels have means, as those of a model do: what a filter lets through of them would show."""
    made = rng.normal(size=(layers, heads, tokens, 16)) + 5 * rng.normal(size=(layers, heads, 1, 16))
    rotated = ROPE.rotate(made, np.arange(tokens))
    return list(torch.from_numpy(rotated).to(dtype))


@pytest.mark.parametrize("tokens", [1024, 1031, STRETCH + 1, 2 * STRETCH + 77])
@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_deviations_and_norms_are_those_of_the_scorers_own_transform(rng, scorer, tokens):
    keys = drawn(rng, tokens)
    got, norms = deviations(scorer, products(scorer, tokens), keys, ROPE)
    joined = torch.cat(keys)
    want = scorer.spectral(ROPE.unrotate(joined.double(), np.arange(tokens)))
    torch.testing.assert_close(norms, joined.norm(dim=-1))
    most = 1e-3 if isinstance(scorer, Fourier) else 1e-5  # beyond 128 tokens a filter in frequency rings on
    assert float((got - want).abs().max() / want.abs().max()) < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scorer", [Fourier(), Wavelet(sign="smoothness"), WaveletTri()], ids=str)
def test_the_tokens_kept_are_those_of_one_layer_after_another(rng, scorer, dtype):
    tokens, budget = 2048, Budget(256)
    keys = drawn(rng, tokens, dtype)
    prefill, evictable = Prefill(np.arange(tokens), keys, keys, [], None), budget.evictable(tokens)
    statistics = QueryStatistics(rng.normal(size=(2, 4, 8)) + 1j, 2 + rng.random((2, 4, 8)))
    views = [
        LayerView(k, k, ROPE, np.arange(tokens), evictable, scaling=0.25, index=i, statistics=statistics)
        for i, k in enumerate(keys)
    ]
    got = together.in_one_pass(scorer, views[0], prefill, None)
    want = [scorer.score(view) for view in views]
    for one, other in zip(select_layers(got, budget), select_layers(want, budget), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_band_of_a_whole_prompt_goes_its_own_way(rng):
    tokens = np.arange(1100)
    keys = drawn(rng, 1100)
    view = LayerView(keys[0], keys[0], ROPE, tokens, slice(4, 1000), scaling=0.25)
    whole, held = Prefill(tokens, keys, keys, [], None), Contents(keys, keys, [tokens, tokens + (tokens > 5)])
    assert together.in_one_pass(Wavelet(), view, whole, None) is not None
    assert together.in_one_pass(Wavelet(), view, held, None) is None
    assert together.in_one_pass(WaveletFourier(), view, whole, None) is None
    assert together.in_one_pass(Fourier(taper=0.0), view, whole, None) is None, "a box rings for ever"
    asked = Prefill(tokens, [k.requires_grad_() for k in drawn(rng, 1100)], keys, [], None)
    assert together.in_one_pass(Wavelet(), view, asked, None) is None, "products into buffers have no gradients"
    double = Prefill(tokens, [k.double() for k in drawn(rng, 1100)], keys, [], None)
    assert together.in_one_pass(Wavelet(), view, double, None) is None, "nor what single precision lacks"


@pytest.mark.parametrize("tokens", [1025, 1060, 2111])
def test_grids_wider_than_a_tile_go_layer_by_layer(tokens):
    """Of 64 tokens that share a coefficient of the sixth level a tile of 32 has none of its own."""
    assert products(Wavelet(wavelet="haar", levels=6), tokens) is None
    assert products(Wavelet(wavelet="haar", levels=5), tokens) is not None


def test_buffers_do_not_grow_with_the_prompt():
    made = products(Fourier(), 40_000)
    assert max(s.stop - s.start for s in made.stretches) <= STRETCH + made.matrices.shape[2]
    several = products(Wavelet(transform="stationary"), 40_000)  # matrices a tile, one after another along all tiles
    assert max(s.stop - s.start for s in several.stretches) <= STRETCH + 2 * several.matrices.shape[2]
    assert sum(run[2] for s in made.stretches for run in s.runs) == made.blocks == 40_000 // TILE


def test_energies_of_long_prompts_are_those_of_their_parts(rng):
    """Far from the ends a token sees the filters that it saw in a shorter prompt."""
    keys = drawn(rng, 5000, layers=1, heads=1)
    long, _ = energies(products(Fourier(), 5000), keys, ROPE)
    short, _ = energies(products(Fourier(), 2400), [k[:, :2400].contiguous() for k in keys], ROPE)
    np.testing.assert_allclose(to_numpy(long)[:, :2200], to_numpy(short)[:, :2200], rtol=1e-3)
