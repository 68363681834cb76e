from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier, nonstationarity, segment_power
from spectral_kv.transforms.wavelet import TRANSFORMS
from spectral_kv.xp import to_numpy

SCORERS = [
    Fourier(),
    Fourier(taper=0.0),
    Wavelet(),
    Wavelet(mode="periodization"),
    Wavelet(transform="stationary"),
    Wavelet(transform="stationary", mode="periodization"),
    WaveletFourier(),
    WaveletFourier(cascade=False),
    WaveletFourier(transform="stationary"),
    Wavelet(centred=True),
    WaveletFourier(centred=True),
]
NAMES = [
    "fourier",
    "fourier-box",
    "wavelet",
    "wavelet-per",
    "wavelet-stationary",
    "wavelet-stationary-per",
    "wavelet_fourier",
    "wavelet_fourier-flat",
    "wavelet_fourier-stationary",
    "wavelet-centred",
    "wavelet_fourier-centred",
]
spectral = pytest.mark.parametrize("scorer", SCORERS, ids=NAMES)


def view(x: np.ndarray, rope, evictable: slice | None = None) -> LayerView:
    """A layer whose keys before RoPE are `x` `[kv_heads, tokens, dim]`; values differ from keys."""
    positions = np.arange(x.shape[1])
    x = torch.from_numpy(x.astype(np.float32))
    return LayerView(
        rope.rotate(x, positions), x.flip(1), rope, positions, evictable or slice(0, x.shape[1]), scaling=1
    )


@spectral
def test_an_impulse_is_the_top_score_wherever_it_is(scorer, rope):
    tokens = 257
    x = np.zeros((tokens, tokens, 16))
    x[np.arange(tokens), np.arange(tokens), 3] = 1.0  # head h has its impulse at token h
    np.testing.assert_array_equal(scorer.score(view(x, rope)).argmax(dim=1).numpy(), np.arange(tokens))


@spectral
def test_an_impulse_in_noise_is_in_the_top_percent(scorer, rope, rng):
    tokens = 257
    x = 0.1 * rng.normal(size=(tokens, tokens, 16)) / 4  # 20 dB below the unit impulse, summed over 16 channels
    x[np.arange(tokens), np.arange(tokens), 3] += 1.0
    deviation = scorer.spectral(torch.from_numpy(x.astype(np.float32)))
    ranks = (deviation > deviation.diagonal()[:, None]).sum(dim=1)
    assert ranks.max() <= 2  # 1 % of 257


@pytest.mark.parametrize(
    "scorer",
    [Fourier(), Wavelet(), Wavelet(transform="stationary"), WaveletFourier(), WaveletFourier(transform="stationary")],
    ids=["fourier", "wavelet", "wavelet-stationary", "wavelet_fourier", "wavelet_fourier-stationary"],
)
def test_a_tone_below_the_cut_off_hardly_deviates(scorer):
    tokens = 1024
    tone = torch.from_numpy(np.cos(np.pi * 8 * np.arange(tokens) / (tokens - 1)).astype(np.float32))[None, :, None]
    assert scorer.spectral(tone).max() < 0.02
    assert scorer.spectral(tone + torch.eye(tokens)[500][None, :, None])[0, 500] > 0.3


@spectral
def test_constant_keys_give_numbers(scorer, rope):
    scores = scorer.score(view(np.ones((2, 300, 16)), rope))
    assert torch.isfinite(scores).all()


@spectral
def test_order_matters_to_the_spectrum(scorer, rng):
    x = torch.from_numpy(np.cumsum(rng.normal(size=(1, 400, 16)), axis=1).astype(np.float32))
    order = torch.from_numpy(rng.permutation(400))
    shuffled = scorer.spectral(x[:, order])
    assert (shuffled - scorer.spectral(x)[:, order]).abs().mean() > 0.5 * shuffled.mean()


@spectral
@pytest.mark.parametrize("kind", ["numpy", "mlx"])
def test_every_kind_of_array_gets_the_same_deviation(kind, scorer, rng):
    make = np.asarray if kind == "numpy" else pytest.importorskip("mlx.core").array
    x = rng.normal(size=(2, 301, 16)).astype(np.float32)
    expected = scorer.spectral(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(to_numpy(scorer.spectral(make(x))), expected, rtol=1e-4, atol=1e-5)


def test_an_impulse_scores_the_same_at_every_token_with_the_stationary_transform_only():
    impulses = np.eye(128)[:, :, None]
    scores = {t: Wavelet(transform=t, mode="periodization").spectral(impulses).diagonal() for t in TRANSFORMS}
    assert scores["stationary"].std() < 1e-5 < 0.01 < scores["decimated"].std()
    # the levels weigh the same in both: the squared gain is the decimated one averaged over all shifts
    np.testing.assert_allclose((scores["stationary"] ** 4).mean(), (scores["decimated"] ** 4).mean(), rtol=1e-5)


def test_the_blend_is_the_weighted_sum_of_its_terms(rope, rng):
    layer = view(rng.normal(size=(2, 200, 16)), rope, slice(4, 150))
    scorer = Wavelet(spectral_weight=0.5, recency_weight=0.3, norm_weight=0.7)
    x = layer.unrotated

    def unit(a):
        low, high = a[:, 4:150].min(dim=1, keepdim=True).values, a[:, 4:150].max(dim=1, keepdim=True).values
        return (a - low) / (high - low)

    expected = 0.5 * unit(scorer.spectral(x)) + 0.3 * torch.linspace(0, 1, 200) + 0.7 * unit(x.norm(dim=-1))
    torch.testing.assert_close(scorer.score(layer), expected, atol=1e-5, rtol=0)


def test_sign_and_signal_choose_what_is_scored(rope, rng):
    layer = view(np.cumsum(rng.normal(size=(1, 300, 16)), axis=1), rope)
    alone = {"recency_weight": 0.0, "norm_weight": 0.0, "spectral_weight": 1.0}
    score = Fourier(**alone).score(layer)
    torch.testing.assert_close(Fourier(sign="smoothness", **alone).score(layer), 1 - score, atol=1e-5, rtol=0)
    for signal in ("rotated_keys", "values"):
        assert not torch.allclose(Fourier(signal=signal, **alone).score(layer), score, atol=0.05)
    flipped = Fourier(signal="values", **alone).score(layer)
    # 300 tokens go on at their end for the margin of a fast transform, not for ever
    torch.testing.assert_close(flipped.flip(1), score, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scorer", [Fourier(), Wavelet(), WaveletFourier()], ids=["fourier", "wavelet", "cascade"])
def test_shuffling_forgets_the_sequence_and_keeps_every_token_at_its_place(scorer, rope, rng):
    """A smooth signal deviates nowhere until its tokens are shuffled; a token like no other still stands out."""
    smooth = np.sin(np.arange(300) / 40)[None, :, None] * np.ones(16)
    smooth[0, 120] += 9.0
    layer = view(smooth, rope)
    shuffled = replace(scorer, shuffle_seed=3, spectral_weight=1.0, recency_weight=0.0, norm_weight=0.0)
    score = shuffled.score(layer)
    assert score[0].argmax() == 120
    order = np.random.default_rng([3, 0]).permutation(300)
    deviation = scorer.spectral(layer.unrotated[:, order])
    low, high = deviation.min(), deviation.max()
    torch.testing.assert_close(score[:, order], (deviation - low) / (high - low), atol=1e-5, rtol=0)
    ordered = replace(shuffled, shuffle_seed=None).score(layer)
    others = [*range(20, 90), *range(150, 280)]
    assert ordered[0, others].mean() < 0.3 * score[0, others].mean()
    assert not torch.equal(score, replace(shuffled, shuffle_seed=4).score(layer))
    assert not torch.equal(score, shuffled.score(replace(layer, seed=(1,))))


def test_without_its_spectral_term_a_score_is_recency_and_norm(rope, rng):
    layer = view(rng.normal(size=(2, 200, 16)), rope)
    same = [s(spectral_weight=0.0).score(layer) for s in (Fourier, Wavelet, WaveletFourier)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert (same[0] - Fourier().score(layer)).abs().mean() > 0.05


@pytest.mark.parametrize(
    "scorer, share",
    [
        (Fourier(), 0.5),
        (Wavelet(centred=True), 0.5),
        (WaveletFourier(centred=True), 0.5),
        (Wavelet(transform="stationary"), 0.5),
        (Wavelet(wavelet="haar"), 0.5),
        (Wavelet(), 0.72),  # what the docstring owns up to
        (WaveletFourier(), 0.72),
    ],
)
def test_how_often_odd_tokens_of_white_noise_are_chosen(scorer, share, rng):
    noise = torch.from_numpy(rng.normal(size=(20, 4096, 16)).astype(np.float32))
    chosen = scorer.spectral(noise)[:, 4:-64].topk(444, dim=1).indices
    assert (chosen % 2).float().mean().item() == pytest.approx(share, abs=0.02)


def test_nonstationarity_is_zero_for_a_constant_small_for_noise_and_large_for_changing_tones(rng):
    tokens = np.arange(1024)
    changing = np.concatenate([np.cos(np.pi * 0.1 * (s + 1) * tokens[:128]) for s in range(8)])
    noise = rng.normal(size=(1024, 64))
    x = np.stack([np.ones((1024, 64)), noise, np.tile(changing[:, None], (1, 64))]).astype(np.float32)
    constant, steady, moving = nonstationarity(segment_power(torch.from_numpy(x))).tolist()
    assert constant == 0
    assert steady < 0.05 < 0.5 < moving <= 1


def test_nonstationarity_hears_tones_that_come_back_in_the_other_half():
    tokens = np.arange(1024)
    tones = np.concatenate([np.cos(np.pi * 0.2 * (s % 4 + 1) * tokens[:128]) for s in range(8)])
    found = nonstationarity(segment_power(torch.from_numpy(tones.astype(np.float32))[None, :, None]))
    assert found.item() == pytest.approx(np.log(4) / np.log(8), abs=0.1)  # four tones in eight segments


def test_a_small_decay_hears_fine_changes_more_than_coarse_ones():
    """Bursts of period 2, which the first level hears, and of period 16, which the deeper ones do."""
    tokens = np.arange(512)
    fine, coarse = (tokens // 32 == 4) * (-1.0) ** tokens, (tokens // 64 == 5) * np.sin(np.pi * tokens / 8)
    x = torch.from_numpy((fine + coarse).astype(np.float32))[None, :, None]
    ratios = []
    for decay in (1.0, 0.5, 0.1):
        deviation = Wavelet(level_decay=decay).spectral(x)[0]
        ratios.append((deviation[336:368].mean() / deviation[136:152].mean()).item())
    assert ratios[0] > 1.3 * ratios[1] > 1.3 * 1.3 * ratios[2]


def test_alpha_one_is_the_wavelet_score_and_alpha_zero_the_cascade(rng):
    x = torch.from_numpy(rng.normal(size=(1, 300, 8)).astype(np.float32))
    torch.testing.assert_close(WaveletFourier(alpha=1.0).spectral(x), Wavelet().spectral(x))
    cascade, flat = WaveletFourier(alpha=0.0).spectral(x), WaveletFourier(alpha=0.0, cascade=False).spectral(x)
    torch.testing.assert_close(flat, Fourier().spectral(x))
    assert (cascade - flat).abs().mean() > 0.05


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wavelet(wavelet="morl"),
        lambda: Wavelet(mode="zero"),
        lambda: Wavelet(levels=0),
        lambda: Wavelet(transform="undecimated"),
        lambda: Fourier(cutoff=0.0),
        lambda: Fourier(sign="up"),
        lambda: Fourier(shuffle_seed=-1),
    ],
)
def test_refuses_impossible_parameters(make):
    with pytest.raises(ValueError, match=r"^[a-z_]+="):
        make()
