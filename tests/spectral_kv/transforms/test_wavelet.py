import numpy as np
import pytest
import pywt
import torch

from spectral_kv.transforms.wavelet import MODES, TRANSFORMS, back_projection, repeating, to_tokens, wavedec


def mlx_array(x):
    return pytest.importorskip("mlx.core").array(x)


arrays = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])


@arrays
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "coif1"])
@pytest.mark.parametrize("tokens", [4096, 1000, 777, 130])
def test_equals_pywt(make, mode, wavelet, tokens, rng):
    x = rng.normal(size=(2, tokens, 2)).astype(np.float32)
    ours = wavedec(make(x), wavelet, 4, mode)
    theirs = pywt.wavedec(x.astype(np.float64), wavelet, mode=mode, level=4, axis=1)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-5)


@arrays
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4"])
@pytest.mark.parametrize("tokens", [4096, 784, 32])
def test_stationary_equals_pywt(make, wavelet, tokens, rng):
    x = rng.normal(size=(2, tokens, 2)).astype(np.float32)
    ours = wavedec(make(x), wavelet, 4, "periodization", "stationary")
    theirs = pywt.swt(x.astype(np.float64), wavelet, level=4, axis=1, trim_approx=True, norm=False)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=1e-5)


@arrays
@pytest.mark.parametrize("mode, ahead", [("symmetric", (6, 1)), ("periodization", (4, 4))])
@pytest.mark.parametrize("tokens", [77, 30, 5])
def test_stationary_equals_a_plain_loop_over_the_extended_sequence(make, mode, ahead, tokens, rng):
    x = rng.normal(size=tokens)
    bank, expected = pywt.Wavelet("db4"), []
    approximation = x
    for spread in (1, 2, 4):
        reach = 8 * spread
        extended = np.pad(approximation, reach, mode={"symmetric": "symmetric", "periodization": "wrap"}[mode])
        low, high = np.zeros(tokens), np.zeros(tokens)
        for t in range(tokens):
            for j in range(8):
                low[t] += bank.dec_lo[j] * extended[reach + t + (ahead[0] - j) * spread]
                high[t] += bank.dec_hi[j] * extended[reach + t + (ahead[1] - j) * spread]
        expected.append(high)
        approximation = low
    expected.append(approximation)
    ours = wavedec(make(x.astype(np.float32)[None, :, None]), "db4", 3, mode, "stationary")
    np.testing.assert_allclose([np.asarray(a)[0, :, 0] for a in ours[::-1]], expected, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 7])
def test_a_shift_of_the_sequence_shifts_the_stationary_coefficients(shift, rng):
    x = rng.normal(size=(1, 101, 1))
    bands = wavedec(x, "db4", 3, "periodization", "stationary")
    shifted = wavedec(np.roll(x, shift, axis=1), "db4", 3, "periodization", "stationary")
    np.testing.assert_allclose(shifted, np.roll(bands, shift, axis=2), atol=1e-12)


def test_refuses_an_unknown_mode(rng):
    with pytest.raises(ValueError, match="symmetric, periodization"):
        wavedec(rng.normal(size=(1, 64, 2)), "db4", 2, "zero")


def test_refuses_an_unknown_transform(rng):
    with pytest.raises(ValueError, match="decimated, stationary"):
        wavedec(rng.normal(size=(1, 64, 2)), "db4", 2, "symmetric", "undecimated")


@arrays
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["db2", "db4", "sym4"])
def test_energy_of_an_impulse_returns_to_its_token(make, transform, mode, wavelet):
    tokens, weights = 201, (1.0, 0.5, 0.25)
    impulses = make(np.eye(tokens, dtype=np.float32)[:, :, None])
    energies = [(d**2).sum(-1) for d in wavedec(impulses, wavelet, 3, mode, transform)[:0:-1]]
    received = np.asarray(to_tokens(energies, tokens, wavelet, mode, weights, transform))
    np.testing.assert_array_equal(received.argmax(axis=1), np.arange(tokens))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
def test_back_projection_is_the_weighted_squared_response(transform, mode):
    tokens, weights = 41, (1.0, 0.3)
    details = wavedec(np.eye(tokens)[:, :, None], "db4", 2, mode, transform)[:0:-1]
    squared = np.concatenate([w * d[..., 0] ** 2 for w, d in zip(weights, details, strict=True)], axis=1)  # [tokens, c]
    fourth = np.concatenate([w * d[..., 0] ** 4 for w, d in zip(weights, details, strict=True)], axis=1)
    expected = squared / np.sqrt(fourth.sum(axis=1, keepdims=True))
    index, gain = back_projection(tokens, "db4", 2, mode, weights, transform)
    dense = np.zeros_like(expected)
    np.add.at(dense, (np.repeat(np.arange(tokens), gain.shape[1]), index), gain.ravel())
    np.testing.assert_allclose(dense, expected, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet, levels", [("haar", 4), ("db4", 3), ("bior3.5", 2)])
def test_the_repeating_back_projection_is_that_of_every_token(transform, mode, wavelet, levels):
    weights = tuple(0.5**level for level in range(levels))
    period, taps = 2**levels, pywt.Wavelet(wavelet).dec_len
    short = (4 * taps + 1) * period
    for tokens in (short - 1, short, short + 1, short + period, short + 3 * period - 1, short + 20 * period + 3):
        index, gain = back_projection(tokens, wavelet, levels, mode, weights, transform)
        table = repeating(tokens, wavelet, levels, mode, weights, transform)
        assert table.repeats > 1 or tokens < short + 2 * period
        inner = slice(table.first, table.first + table.period)
        of_periods = [table.index[inner] + number * table.step[inner] for number in range(table.repeats)]
        ours = np.concatenate([table.index[: inner.start], *of_periods, table.index[inner.stop :]])
        gains = [table.gain[: inner.start], *[table.gain[inner]] * table.repeats, table.gain[inner.stop :]]
        energy = np.random.default_rng(0).random(index.max() + 1)
        expected = (energy[index].reshape(gain.shape) * gain).sum(axis=1)
        np.testing.assert_allclose((energy[ours] * np.concatenate(gains)).sum(axis=1), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(33, 5), (2, 3, 33, 5), (1, 200, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tiles_of_coefficients_are_those_of_shifted_copies(rng, shape, dtype):
    x = torch.from_numpy(rng.normal(size=shape)).to(dtype)
    got, want = (wavedec(y, "db4", 3) for y in (x, x.double().numpy()))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        error = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
        np.testing.assert_allclose(one.double(), other, atol=error * np.abs(other).max())
