import pytest
import torch

from spectral_kv.at_rest import exact


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_numbers_come_back_bit_for_bit(rng, dtype):
    arrays = [torch.from_numpy(rng.normal(size=(2, n, 8)) * 3).to(getattr(torch, dtype)) for n in (40, 7, 0)]
    arrays[0][0, 0, :4] = torch.tensor([0.0, -0.0, 1e-4, -300.0])
    tensors = exact.encode(arrays)
    found = exact.decode(tensors, [tuple(x.shape) for x in arrays], arrays[0])
    for x, y in zip(arrays, found, strict=True):
        assert y.dtype == x.dtype and torch.equal(y.ravel().view(torch.uint8), x.ravel().view(torch.uint8))


def test_many_numbers_have_no_more_lanes_and_those_of_more_are_read(rng, monkeypatch):
    x = torch.from_numpy(rng.normal(size=(2, 400, 8))).to(torch.bfloat16)
    more = exact.encode([x])
    monkeypatch.setattr(exact, "LANES", 3)
    fewer = exact.encode([x])
    assert more["states"].shape == (1, 13) and fewer["states"].shape == (1, 3)
    for tensors in (more, fewer):
        assert torch.equal(exact.decode(tensors, [tuple(x.shape)], x)[0], x)


def test_exponents_take_less_than_their_bits(rng):
    x = torch.from_numpy(rng.normal(size=(4, 500, 16))).to(torch.bfloat16)
    assert sum(t.nbytes for t in exact.encode([x]).values()) < 0.8 * x.nbytes


@pytest.mark.parametrize("arrays", [[torch.zeros(2, 3, 8)], [torch.zeros(2, 0, 8)] * 2])
def test_nothing_and_zeros_alone(arrays):
    found = exact.decode(exact.encode(arrays), [tuple(x.shape) for x in arrays], arrays[0])
    assert all(torch.equal(y, x) for x, y in zip(arrays, found, strict=True))
