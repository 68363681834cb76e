import numpy as np
import pytest
import torch

from spectral_kv.transforms.fourier import FAR, continuation, dies_out, highpass, lowpass, lowpass_mask, surroundings


def reference(x: np.ndarray, cutoff: float, taper: float, period: int) -> np.ndarray:
    """Float64, by the full complex transform of the even continuation."""
    n, half = x.shape[1], period // 2 + 1
    longer = np.pad(x, ((0, 0), (0, half - n), (0, 0)), mode="reflect")
    even = np.concatenate([longer, longer[:, -2:0:-1]], axis=1).astype(np.float64)
    frequency = np.abs(np.fft.fftfreq(period, d=0.5))
    start = cutoff * (1 - taper)
    gain = np.where(frequency <= start, 1.0, 0.0)
    inside = (frequency > start) & (frequency <= cutoff)
    gain[inside] = 0.5 * (1 + np.cos(np.pi * (frequency[inside] - start) / (cutoff - start)))
    return np.fft.ifft(np.fft.fft(even, axis=1) * gain[None, :, None], axis=1).real[:, :n]


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("tokens, period", [(16, 30), (257, 512), (300, 726), (2051, 4312), (4096, 8400)])
@pytest.mark.parametrize("cutoff, taper", [(0.25, 0.5), (0.1, 0.0), (1.0, 1.0)])
def test_equals_the_float64_reference(make, tokens, period, cutoff, taper, rng):
    assert len(continuation(tokens)) == period
    x = rng.normal(size=(2, tokens, 3)).astype(np.float32)
    smooth = np.asarray(lowpass(make(x), cutoff, taper))
    np.testing.assert_allclose(smooth, reference(x, cutoff, taper, period), atol=1e-5)
    np.testing.assert_allclose(np.asarray(highpass(make(x), cutoff, taper)), x - smooth, atol=1e-5)


def test_the_continuation_has_no_jump():
    for tokens in range(3, 300):
        index = continuation(tokens)
        assert (index[:tokens] == np.arange(tokens)).all()
        assert (np.abs(np.diff(np.append(index, index[0]))) == 1).all()


def test_long_sequences_are_filtered_in_a_shorter_period_where_the_filter_dies_out(rng):
    """Also of signals whose ends are far apart, which the shorter period joins."""
    assert len(surroundings(4096)) == 5120 and (surroundings(4096)[FAR : FAR + 4096] == np.arange(4096)).all()
    assert dies_out(0.25, 0.5) and not dies_out(0.25, 0.0) and not dies_out(0.05, 0.5)
    x = np.linspace(-5, 5, 4096)[None, :, None] + rng.normal(size=(1, 4096, 2))
    for cutoff, taper, error in ((0.25, 0.5, 2e-6), (0.25, 0.0, 1e-12)):
        want = x - reference(x, cutoff, taper, 8400)
        got = highpass(x.copy(), cutoff, taper)
        assert np.abs(got - want).max() < max(error, 1e-6) * np.abs(want).max()


def test_mask_is_one_then_half_a_cosine_then_zero():
    mask = lowpass_mask(101, cutoff=0.4, taper=0.5)
    assert (mask[:21] == 1).all() and (mask[41:] == 0).all()
    assert mask[30] == pytest.approx(0.5, abs=1e-6)
    assert (np.diff(mask[20:41]) < 0).all()
    assert set(lowpass_mask(101, 0.4, 0.0)) == {0.0, 1.0}


def test_passes_low_tones_and_stops_high_ones():
    tokens = 1001
    tone = lambda cycles: np.cos(np.pi * cycles * np.arange(tokens) / (tokens - 1))[None, :, None]  # noqa: E731
    np.testing.assert_allclose(lowpass(tone(50), 0.25, 0.5), tone(50), atol=1e-6)
    np.testing.assert_allclose(lowpass(tone(600), 0.25, 0.5), 0, atol=1e-6)
    np.testing.assert_allclose(highpass(tone(50), 0.25, 0.5), 0, atol=1e-6)
    np.testing.assert_allclose(highpass(tone(600), 0.25, 0.5), tone(600), atol=1e-6)
