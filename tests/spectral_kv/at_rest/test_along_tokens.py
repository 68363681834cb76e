import numpy as np
import pytest
import torch

from spectral_kv.at_rest.along_tokens import backward, cosine, forward


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
