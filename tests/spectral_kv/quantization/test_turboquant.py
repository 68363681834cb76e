import numpy as np
import pytest
import torch
from scipy.stats import norm

from spectral_kv.quantization.turboquant import TurboQuant, codebook, rotation

DISTORTION = {2: 0.1174818, 3: 0.0345478, 4: 0.0095010}  # Lloyd-Max on N(0, 1)
PLAIN = {
    (64, 2): 0.11455,
    (64, 3): 0.03344,
    (64, 4): 0.009171,
    (128, 2): 0.11601,
    (128, 3): 0.03398,
    (128, 4): 0.009325,
}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_is_the_fixed_point_of_lloyd_max(bits):
    centroids, thresholds = codebook(bits)
    assert len(centroids) == 2**bits
    np.testing.assert_allclose(centroids, -centroids[::-1])
    edges = np.array([-np.inf, *thresholds, np.inf], dtype=float)
    mass = np.diff(norm.cdf(edges))
    np.testing.assert_allclose(centroids, -np.diff(norm.pdf(edges)) / mass, atol=1e-6)  # conditional means
    assert 1 - (mass * centroids**2).sum() == pytest.approx(DISTORTION[bits], abs=1e-6)


def test_rotation_is_orthogonal_reproducible_and_differs_between_seeds():
    q = rotation(64, (0, 1))
    np.testing.assert_allclose(q @ q.T, np.eye(64), atol=1e-5)
    np.testing.assert_array_equal(q, rotation(64, (0, 1)))
    assert np.abs(q - rotation(64, (0, 2))).max() > 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_error_of_gaussian_vectors_is_the_published_one(bits, dim):
    x = torch.from_numpy(np.random.default_rng(99).normal(size=(1, 20_000, dim)).astype(np.float32))
    quantizer = TurboQuant(bits, (0,), "plain", center=False)
    decoded = quantizer.decode(quantizer.encode(x))
    error = ((decoded - x) ** 2).sum(-1) / (x**2).sum(-1)
    assert error.mean() == pytest.approx(PLAIN[dim, bits], rel=0.015)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_corrections_keep_the_norm_or_the_inner_product(bits, rng):
    x = torch.from_numpy(rng.normal(size=(2, 500, 64)).astype(np.float32))
    renorm = TurboQuant(bits, (0,), "renorm", center=False)
    unbiased = TurboQuant(bits, (0,), "unbiased", center=False)
    kept = renorm.decode(renorm.encode(x))
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    dot = (unbiased.decode(unbiased.encode(x)) * x).sum(-1)
    torch.testing.assert_close(dot, (x * x).sum(-1), rtol=1e-3, atol=0)
    assert ((kept * x).sum(-1) / (x * x).sum(-1)).mean() < 1 - DISTORTION[bits] / 4  # renorm alone still shrinks


def test_unbiased_vectors_average_to_the_truth_over_rotations(rng):
    x = torch.from_numpy(rng.normal(size=(1, 5, 64)).astype(np.float32))
    decoded = [q.decode(q.encode(x)) for q in (TurboQuant(2, (seed,), "unbiased", center=False) for seed in range(300))]
    error = (torch.stack(decoded).mean(0) - x).norm() / x.norm()
    assert error < 0.05  # a single rotation is off by 0.36


def test_codes_are_invariant_to_scale_and_the_scalar_is_not(rng):
    x = torch.from_numpy(rng.normal(size=(1, 50, 64)).astype(np.float32))
    quantizer = TurboQuant(4, (0,), "renorm", center=False)
    one, ten = quantizer.encode(x), quantizer.encode(10 * x)
    torch.testing.assert_close(one.codes, ten.codes)
    torch.testing.assert_close(10 * one.scale, ten.scale, rtol=2e-3, atol=0)


@pytest.mark.parametrize("correction", ["renorm", "unbiased"])
def test_zero_and_huge_vectors(correction):
    quantizer = TurboQuant(4, (0,), correction, center=False)
    x = torch.zeros((1, 2, 64), dtype=torch.bfloat16)
    x[0, 1, 7] = 1e4
    decoded = quantizer.decode(quantizer.encode(x))
    assert (decoded[0, 0] == 0).all()
    assert (decoded[0, 1] - x[0, 1]).norm() < 0.2e4


def test_centring_does_not_change_attention_and_rescues_offset_keys(rng):
    keys = rng.normal(size=(1, 1000, 64)).astype(np.float32)
    keys[:, :, :3] += 60.0  # what a large bias of the key projection does
    keys = torch.from_numpy(keys)
    queries = torch.from_numpy(rng.normal(size=(1, 40, 64)).astype(np.float32))

    def attention(k):
        return torch.softmax(queries @ k.transpose(1, 2) / 8, dim=-1)

    torch.testing.assert_close(attention(keys), attention(keys - keys.mean(dim=1, keepdim=True)), atol=1e-5, rtol=1e-3)

    def divergence(center):
        quantizer = TurboQuant(3, (0,), "renorm", center)
        p, q = attention(keys), attention(quantizer.decode(quantizer.encode(keys)))
        return (p * (p / q).log()).sum(-1).mean()

    assert divergence(True) < divergence(False) / 5


def test_the_same_codes_from_numpy_and_torch(rng):
    x = rng.normal(size=(2, 100, 64)).astype(np.float32)
    quantizer = TurboQuant(3, (5,), "unbiased", center=True)
    ours, theirs = quantizer.encode(x), quantizer.encode(torch.from_numpy(x))
    assert (ours.codes != theirs.codes.numpy()).mean() < 1e-4  # a coordinate may sit on a threshold
    np.testing.assert_allclose(ours.scale, theirs.scale.numpy(), rtol=2e-3)
