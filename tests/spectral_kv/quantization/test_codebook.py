import numpy as np
import pytest
from scipy.stats import norm

from spectral_kv.quantization.codebook import codebook

DISTORTION = {1: 0.3633802, 2: 0.1174818, 3: 0.0345478, 4: 0.0095010}  # Lloyd-Max on N(0, 1)
POSITIVE_THRESHOLDS = {
    1: [],
    2: [0.9815988],
    3: [0.5005497, 1.0499573, 1.7479275],
    4: [0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034],
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codebook_is_the_fixed_point_of_lloyd_max(bits):
    centroids, thresholds = codebook(bits)
    assert len(centroids) == 2**bits
    np.testing.assert_array_equal(centroids, -centroids[::-1])
    positive = np.array(POSITIVE_THRESHOLDS[bits])
    np.testing.assert_allclose(thresholds, [*-positive[::-1], 0, *positive], atol=1e-6)
    edges = np.array([-np.inf, *thresholds, np.inf], dtype=float)
    mass = np.diff(norm.cdf(edges))
    np.testing.assert_allclose(centroids, -np.diff(norm.pdf(edges)) / mass, atol=1e-6)  # conditional means
    distortion = 1 - (mass * centroids**2).sum()
    assert distortion == pytest.approx(DISTORTION[bits], abs=1e-6)
    assert 4**-bits <= distortion <= 2.7207 * 4**-bits  # the bounds of any quantiser and of the paper's theorem 1
