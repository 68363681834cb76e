import numpy as np
import pytest
import torch

from spectral_kv import xp
from spectral_kv.xp import constant, lengths, turned


@pytest.fixture
def none_kept(monkeypatch):
    monkeypatch.setattr(xp, "_constants", xp.OrderedDict())


def test_a_constant_is_brought_to_a_kind_of_array_once(none_kept):
    values, x = np.arange(5), torch.zeros(1)
    first = constant(values, x)
    assert isinstance(first, torch.Tensor) and first.tolist() == [0, 1, 2, 3, 4]
    assert constant(values, x) is first
    assert isinstance(constant(values, np.zeros(1)), np.ndarray)


def test_an_array_that_took_the_place_of_another_is_not_taken_for_it(none_kept):
    x = torch.zeros(1)
    for number in range(200):  # freed arrays leave their addresses to new ones
        assert constant(np.full(3, number), x).tolist() == [number] * 3


def test_the_constants_used_last_stay(none_kept, monkeypatch):
    monkeypatch.setattr(xp, "CONSTANTS_MB", 0.002)
    arrays, x = [np.full(100, i) for i in range(3)], torch.zeros(1)  # 800 bytes each: two fit
    kept = [constant(a, x) for a in arrays[:2]]
    assert constant(arrays[0], x) is kept[0]
    constant(arrays[2], x)
    assert constant(arrays[0], x) is kept[0]
    assert len(xp._constants) == 2


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_the_largest_of_equal_numbers_are_the_first(count):
    x = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0, 2.0]])
    expected = np.sort(np.argsort(-x, axis=-1, kind="stable")[:, :count], axis=-1)
    for values in (x, torch.as_tensor(x)):
        assert np.array_equal(np.asarray(xp.largest(values, count)), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_lengths_and_turned_pairs_of_every_precision(rng, dtype):
    x = torch.from_numpy(rng.normal(size=(2, 5, 6))).to(getattr(torch, dtype))
    angles = torch.from_numpy(rng.normal(size=(5, 3))).float()
    pairs = torch.complex(x[..., :3].double(), x[..., 3:].double())
    want = pairs * torch.exp(1j * angles.double())
    got = turned(x, angles.cos(), angles.sin())
    torch.testing.assert_close(got.double(), torch.cat([want.real, want.imag], -1), rtol=1e-6, atol=1e-6)
    assert lengths(x).dtype == torch.float32
    torch.testing.assert_close(lengths(x).double(), x.double().norm(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 3, 7, 4), (3, 0, 4)])
def test_rows_are_each_heads_own_in_every_layout(rng, shape):
    x = rng.normal(size=shape)
    chosen = rng.integers(0, max(shape[-2], 1), size=(*shape[:-2], 5 if shape[-2] else 0))
    want = np.take_along_axis(x, chosen[..., None], axis=-2)
    given, index = torch.from_numpy(x), torch.from_numpy(chosen)
    np.testing.assert_array_equal(xp.rows(x, chosen), want)
    np.testing.assert_array_equal(xp.rows(given, index), want)
    np.testing.assert_array_equal(xp.rows(given.mT.contiguous().mT, index), want)  # not contiguous
    np.testing.assert_array_equal(xp.rows(given, index.int()), want)


def test_rows_of_several_sequences_can_be_the_same_ones(rng):
    x, chosen = torch.from_numpy(rng.normal(size=(2, 3, 7, 4))), torch.from_numpy(rng.integers(0, 7, size=(1, 3, 5)))
    assert torch.equal(xp.rows(x, chosen), xp.rows(x, chosen.expand(2, 3, 5)))


def test_what_is_picked_is_in_the_order_of_the_indices(rng):
    x, index = rng.normal(size=(3, 7, 4)), np.array([6, 0, 0, 3])
    for values in (x, torch.from_numpy(x)):
        np.testing.assert_array_equal(xp.picked(values, xp.like(index, values), -2), x[:, index])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weighted_sums_are_alike_in_numpy_and_torch(rng, dtype):
    x, index = rng.normal(size=(3, 50)).astype(dtype), rng.integers(50, size=(4, 7, 5))
    gain = rng.normal(size=(7, 5)).astype(np.float32)
    want = (x[:, index] * gain).sum(axis=-1)
    np.testing.assert_allclose(xp.weighted_sums(x, index, gain), want, rtol=1e-4, atol=1e-5)
    got = xp.weighted_sums(*map(torch.from_numpy, (x, index, gain)))
    assert got.dtype == torch.from_numpy(x).dtype
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)
