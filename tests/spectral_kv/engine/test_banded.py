"""Spectral deviations in one pass: what the scorers' own transforms give, for every length."""

import numpy as np
import pytest
import torch

from spectral_kv.engine.banded import REACH, filtered, fir, plan, smooth
from spectral_kv.engine.cascade import plans
from spectral_kv.engine.cascade import segment_power as cascade_power
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier, segment_power
from spectral_kv.transforms.fourier import highpass

TOKENS = [1024, 1025, 1100, 1151, 2047]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "scorer",
    [Wavelet(), Wavelet(wavelet="haar", levels=3), Wavelet(mode="periodization"), Wavelet(level_decay=0.8)],
    ids=["db4", "haar", "periodization", "level_decay"],
)
def test_a_wavelet_plan_is_the_scorers_transform_at_every_token(rng, scorer, tokens):
    x = rng.normal(size=(2, tokens, 3))
    made = plan(scorer, tokens)
    if made is None:
        assert scorer.mode == "periodization"  # its ends see one another
        return
    np.testing.assert_allclose(filtered(made, x), scorer.spectral(x), rtol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_fourier_plan_is_the_scorers_transform_but_for_what_rings_on(rng, tokens):
    x = rng.normal(size=(2, tokens, 3))
    got, want = filtered(plan(Fourier(), tokens), x), Fourier().spectral(x)
    assert np.linalg.norm(got - want) < 2e-4 * np.linalg.norm(want)
    np.testing.assert_allclose(got[:, 200:-200], want[:, 200:-200], rtol=1e-3)


@pytest.mark.parametrize(
    "scorer",
    [Fourier(taper=0.0), WaveletFourier(), Wavelet(signal="values"), Wavelet(shuffle_seed=1), Wavelet(centred=True)],
    ids=["box", "cascade", "values", "shuffled", "centred"],
)
def test_what_is_not_a_band_of_filters_has_no_plan(scorer):
    assert plan(scorer, 2048) is None


def test_short_sequences_have_no_plan():
    assert plan(Wavelet(), 1000) is None


def test_a_filter_of_a_short_band_is_the_scorers(rng):
    x = rng.normal(size=(2, 262, 3))
    got, want = filtered(fir(0.25, 0.5, 262), x), np.sqrt(np.sum(highpass(x, 0.25, 0.5) ** 2, axis=-1))
    assert np.linalg.norm(got - want) < 2e-4 * np.linalg.norm(want)
    assert fir(0.25, 0.5, 255) is None


@pytest.mark.parametrize("cutoff, tile, rank", [(0.25, 64, 16), (0.25, 128, 32), (0.6, 64, 32), (0.6, 128, None)])
def test_what_a_filter_takes_away_is_sums_and_differences_of_mirrored_tokens(rng, cutoff, tile, rank):
    made = smooth(cutoff, 0.5, tile)
    if rank is None:
        assert made is None  # more numbers than a tile's half has tokens to spare
        return
    assert made.down.shape[1] == rank
    x = rng.normal(size=tile + 2 * REACH)
    outer, inner = x[: len(x) // 2], x[len(x) // 2 :][::-1]
    numbers = (made.down[0] @ (outer + inner), made.down[1] @ (outer - inner))
    sums, differences = (up @ n for up, n in zip(made.up, numbers, strict=True))
    found = np.concatenate([sums + differences, (sums - differences)[::-1]])
    want = x[REACH:-REACH] - fir(cutoff, 0.5, 2 * tile + REACH, tile).matrices[0] @ x
    np.testing.assert_allclose(found, want, atol=3e-5)


@pytest.mark.parametrize("cutoff, tile", [(0.25, 64), (0.25, 128), (0.4, 64), (0.2, 128)])
def test_few_numbers_lose_little_of_what_a_filter_takes_away(cutoff, tile):
    """Of any tokens: 1e-5 of their norm at most."""
    made, x = smooth(cutoff, 0.5, tile), np.eye(tile + 2 * REACH)
    outer, inner = x[: len(x) // 2], x[len(x) // 2 :][::-1]
    sums, differences = (
        up @ (down @ y) for up, down, y in zip(made.up, made.down, (outer + inner, outer - inner), strict=True)
    )
    found = np.concatenate([sums + differences, (sums - differences)[::-1]])
    want = x[REACH:-REACH] - fir(cutoff, 0.5, 2 * tile + REACH, tile).matrices[0] @ x
    assert np.linalg.norm(found - want, 2) < 1e-5


def test_a_cascade_filters_every_band_of_a_prompt_that_is_long_enough():
    bands, filters = plans(WaveletFourier(), 4096)
    assert [f.energies for f in filters] == [2051, 1029, 518, 262]
    assert bands.energies == 3860
    assert plans(WaveletFourier(), 2048) is None
    assert plans(WaveletFourier(centred=True), 4096) is None


def test_the_power_of_segments_is_the_scorers_but_for_their_mean(rng):
    x = rng.normal(5, 1, size=(2, 1003, 4))
    got = cascade_power(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got[..., 1:], segment_power(x)[..., 1:], rtol=1e-9)
    assert not got[..., 0].any()
