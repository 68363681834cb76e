"""The array-neutral core on MLX arrays, against NumPy, PyWavelets and torch, at many shapes."""

import numpy as np
import pytest
import pywt
import torch

mx = pytest.importorskip("mlx.core")

from spectral_kv.attention import attention_output, attention_weights
from spectral_kv.quantization.packing import pack, unpack
from spectral_kv.quantization.turboquant import TurboQuant
from spectral_kv.rope import Rope
from spectral_kv.selection import Budget, select
from spectral_kv.transforms.fourier import highpass, lowpass
from spectral_kv.transforms.wavelet import wavedec
from spectral_kv.xp import float32, rows, softmax, stable_order, to_numpy, wide

TOLERANCE = 1e-5  # of the spread


def signal(tokens: int, dim: int = 8, heads: int = 2) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    return np.cumsum(rng.normal(size=(heads, tokens, dim)), axis=1).astype(np.float32)


def equal(found, expected, tolerance: float = TOLERANCE) -> None:
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.ptp(expected), 1e-30))


@pytest.mark.parametrize("tokens", [3, 17, 64, 130, 777])
def test_numpy_torch_and_mlx_agree_at_every_length(tokens):
    x = signal(tokens)
    rope = Rope(10_000.0 ** -(np.arange(4) / 4))
    kept = np.sort(np.random.default_rng(1).permutation(tokens)[: tokens // 2 + 1])[None].repeat(2, axis=0)

    def core(make) -> dict:
        y = make(x)
        queries = make(x[:, :3].repeat(2, axis=0) / 10)
        return {
            "softmax": softmax(y),
            "rotated": rope.rotate(y, np.arange(tokens)),
            "unrotated": rope.unrotate(y, np.arange(tokens)),
            "rows": rows(y, make(kept)),
            "lowpass": lowpass(y, 0.25, 0.5),
            "highpass": highpass(y, 0.25, 0.5),
            "weights": attention_weights(queries, y, 0.3),
            "output": attention_output(queries, y, y, 0.3),
        }

    expected, from_torch, from_mlx = (core(make) for make in (np.asarray, torch.from_numpy, mx.array))
    for name, value in expected.items():
        equal(from_torch[name], value), equal(from_mlx[name], value)


@pytest.mark.parametrize("seed", range(3))
def test_ties_are_broken_alike(seed):
    scores = np.random.default_rng(seed).integers(0, 4, size=(3, 500)).astype(np.float32)
    for function in (stable_order, lambda s: select(s, Budget(200, 3, 20))):
        expected, *others = (to_numpy(function(make(scores))) for make in (np.asarray, torch.from_numpy, mx.array))
        for found in others:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym4"])
@pytest.mark.parametrize("tokens", [130, 777, 1000])
def test_wavelets_are_those_of_pywavelets(mode, wavelet, tokens):
    x = signal(tokens, heads=1)
    found = wavedec(mx.array(x), wavelet, 4, mode)
    expected = pywt.wavedec(x.astype(np.float64), wavelet, mode=mode, level=4, axis=1)
    for one, other in zip(found, expected, strict=True):
        equal(one, other)


@pytest.mark.parametrize("tokens", [97, 512])
def test_the_low_pass_of_a_tone_is_the_tone(tokens):
    tone = np.cos(2 * np.pi * np.arange(tokens) / 32).astype(np.float32)[None, :, None].repeat(4, axis=2)
    smooth = to_numpy(lowpass(mx.array(tone), 0.5, 0.5))
    np.testing.assert_allclose(smooth[:, 20:-20], tone[:, 20:-20], atol=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_bytes_are_the_same_bit_for_bit(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, size=(2, 50, 64)).astype(np.uint8)
    packed = [pack(make(codes), bits) for make in (np.asarray, mx.array)]
    np.testing.assert_array_equal(*map(to_numpy, packed))
    assert packed[1].nbytes == 2 * 50 * 64 * bits // 8
    np.testing.assert_array_equal(to_numpy(unpack(packed[1], bits)), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_vectors_of_exact_length_are_the_same_bit_for_bit(bits):
    """Norms that are powers of two divide without rounding, so nothing is left that could differ."""
    x = np.random.default_rng(bits).choice([-1.0, 1.0], size=(2, 300, 64)).astype(np.float32)
    one, other = (TurboQuant(bits, (0, 1), "unbiased", center=False).encode(make(x)) for make in (np.asarray, mx.array))
    np.testing.assert_array_equal(one.codes, to_numpy(other.codes))
    equal(other.scale, one.scale, 1e-3)


def test_16_bit_floats_come_out_as_numbers():
    x = mx.array([1.0, -2.5, 3e38]).astype(mx.bfloat16)
    assert to_numpy(x).dtype == np.float32 and to_numpy(x)[1] == -2.5
    assert to_numpy(mx.array([1.5], dtype=mx.float16)).dtype == np.float16
    assert float32(x).dtype == wide(x).dtype == mx.float32
