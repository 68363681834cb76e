import numpy as np
import pytest
import torch

from spectral_kv.at_rest.along_tokens import backward, cosine, forward, pays
from spectral_kv.at_rest.rounding import Components


@pytest.mark.parametrize("size", [1, 4, 64])
def test_the_way_back_gives_what_was_there(rng, size):
    x = torch.from_numpy(rng.normal(size=(6, 150)).astype(np.float32))
    y = forward(x, size)
    torch.testing.assert_close(backward(y, size), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((y**2).sum(dim=1), (x**2).sum(dim=1), atol=1e-4, rtol=1e-5)
    start = 2 * size
    torch.testing.assert_close(backward(y[:, start:], size), x[:, start:], atol=1e-5, rtol=1e-5)


def test_a_constant_is_in_the_first_frequency_and_the_rest_of_a_block_stays():
    x = torch.ones((2, 10))
    y = forward(x, 8)
    np.testing.assert_allclose(y[:, 0], 8**0.5, rtol=1e-6)
    np.testing.assert_allclose(y[:, 1:8], 0, atol=1e-6)
    assert torch.equal(y[:, 8:], x[:, 8:])
    np.testing.assert_allclose(cosine(8) @ cosine(8).T, np.eye(8), atol=1e-6)


def test_it_pays_for_tokens_that_are_like_their_neighbours_and_not_for_single_ones(rng):
    z = rng.normal(size=(24, 2000))
    alike = np.cumsum(z, axis=1) - np.cumsum(z, axis=1)[:, ::100].repeat(100, axis=1)
    single = z * 20 * (rng.random(2000) < 0.02)
    for values, wanted in ((alike, True), (single, False)):
        x = torch.from_numpy(values.astype(np.float32))
        assert pays(Components(x, np.repeat([0, 1, 2], [2, 1, 21])), 64, 1.0) == wanted


def test_it_does_not_pay_where_the_scales_of_blocks_say_more(rng):
    """Each of two blocks is in every other token alone, which one block's scale for both would not say."""
    x = 0.9 * rng.normal(size=(24, 20)).repeat(100, axis=1) + 0.45 * rng.normal(size=(24, 2000))
    x[:12, 1::2] = x[12:, ::2] = 0
    x = torch.from_numpy(x.astype(np.float32))
    assert not pays(Components(x, np.repeat([0, 1], 12)), 64, 1.0)
    assert pays(Components(x, np.zeros(24, dtype=int)), 64, 1.0)
