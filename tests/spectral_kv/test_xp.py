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
