import numpy as np
import pytest

from spectral_kv.quantization.turboquant import TurboQuant
from tests.spectral_kv.quantization.test_codebook import DISTORTION
from tests.spectral_kv.quantization.turboquant_prod import TurboQuantProd


def gaussian(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inner_products_are_right_on_average(bits):
    x = unit(gaussian(1, 5, 64, seed=99))
    q = unit(x + 0.05 * gaussian(1, 5, 64, seed=98))  # queries near the vectors, which plain codes would shrink
    estimates = np.array([(q * TurboQuantProd(bits, (seed,)).estimate(x)).sum(-1) for seed in range(300)])
    excess = (estimates - (q * x).sum(-1)).mean(-1)
    error = excess.std(ddof=1) / 300**0.5
    assert abs(excess.mean()) < 3 * error
    assert DISTORTION[bits - 1] > 10 * error  # what forgetting the residual would cost, seen clearly


@pytest.mark.parametrize("bits, variance", [(2, 0.571), (3, 0.1845), (4, 0.0543)])
def test_variance_of_inner_products_is_the_published_one(bits, variance):
    x, q = unit(gaussian(1, 4000, 128, seed=99)), unit(gaussian(8, 4000, 128, seed=98))
    errors = [((q[i] * (TurboQuantProd(bits, (i,)).estimate(x) - x)).sum(-1)) for i in range(8)]
    assert 128 * np.var(errors) == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_attention_is_worse_than_with_plain_codes(bits):
    """Even with one bit more: why no storage uses it."""
    keys, queries = gaussian(1, 1024, 128, seed=99), gaussian(64, 128, seed=98)

    def log_attention(k):
        logits = 1.5 * queries @ k[0].T / 128**0.5
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def divergence(k):
        p, q = log_attention(keys), log_attention(k)
        return (np.exp(p) * (p - q)).sum(-1).mean()

    plain = TurboQuant(bits, (0,), "plain", center=False)
    fewer = TurboQuant(bits - 1, (0,), "plain", center=False)
    prod = divergence(TurboQuantProd(bits, (0,)).estimate(keys))
    assert prod > 3 * divergence(plain.decode(plain.encode(keys)))
    assert prod > divergence(fewer.decode(fewer.encode(keys)))


def test_the_same_estimate_from_every_kind_of_array(make):
    x = gaussian(2, 20, 64, seed=99)
    estimate = np.asarray(TurboQuantProd(3, (0,)).estimate(make(x)))
    np.testing.assert_allclose(estimate, TurboQuantProd(3, (0,)).estimate(x), atol=1e-3)


@pytest.mark.parametrize("bits", [1, 6])
def test_bits_it_does_not_have_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be 2 to 5"):
        TurboQuantProd(bits, (0,))
