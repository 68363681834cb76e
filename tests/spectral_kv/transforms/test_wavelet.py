import numpy as np
import pytest
import pywt
import torch

from spectral_kv.transforms.wavelet import MODES, back_projection, to_tokens, wavedec


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
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


def test_refuses_an_unknown_mode(rng):
    with pytest.raises(ValueError, match="symmetric, periodization"):
        wavedec(rng.normal(size=(1, 64, 2)), "db4", 2, "zero")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["db2", "db4", "sym4"])
def test_energy_of_an_impulse_returns_to_its_token(mode, wavelet):
    tokens, weights = 200, (1.0, 0.5, 0.25)
    impulses = np.eye(tokens)[:, :, None]
    energies = [(d**2).sum(axis=-1) for d in wavedec(impulses, wavelet, 3, mode)[:0:-1]]
    np.testing.assert_array_equal(to_tokens(energies, tokens, wavelet, mode, weights).argmax(axis=1), np.arange(tokens))


def test_back_projection_is_the_weighted_squared_response():
    tokens, weights = 40, (1.0, 0.3)
    details = wavedec(np.eye(tokens)[:, :, None], "db4", 2, "symmetric")[:0:-1]
    squared = np.concatenate([w * d[..., 0] ** 2 for w, d in zip(weights, details, strict=True)], axis=1)  # [tokens, c]
    fourth = np.concatenate([w * d[..., 0] ** 4 for w, d in zip(weights, details, strict=True)], axis=1)
    expected = squared / np.sqrt(fourth.sum(axis=1, keepdims=True))
    index, gain = back_projection(tokens, "db4", 2, "symmetric", weights)
    dense = np.zeros_like(expected)
    np.add.at(dense, (np.repeat(np.arange(tokens), index.shape[1]), index.ravel()), gain.ravel())
    np.testing.assert_allclose(dense, expected, atol=1e-6)
