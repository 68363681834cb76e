import itertools

import numpy as np
import pytest

from spectral_kv.codec.allocation import BITS, water_filling
from spectral_kv.quantization.codebook import codebook, distortion


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_distortion_is_what_a_quantiser_leaves(bits, rng):
    x = rng.normal(size=400_000)
    centroids, thresholds = codebook(bits)
    error = ((x - centroids[np.searchsorted(thresholds, x)]) ** 2).mean()
    np.testing.assert_allclose(distortion(bits), error, rtol=0.03)


def left(variances, bits):
    return sum(v * distortion(int(b)) for v, b in zip(np.concatenate(variances), np.concatenate(bits), strict=True))


def test_no_other_allocation_is_better():
    variances = [np.repeat([9.0, 1.0], 8), np.repeat([3.0, 0.2], 8)]
    found = water_filling(variances, 8 * 6, side=0)
    others = (
        [np.repeat(b[:2], 8), np.repeat(b[2:], 8)] for b in itertools.product(range(BITS + 1), repeat=4) if sum(b) == 6
    )
    assert left(variances, found) <= min(left(variances, other) for other in others) + 1e-9


def test_bits_fall_with_variance_and_the_budget_holds():
    variances = [np.geomspace(100, 1e-4, 64), np.geomspace(1, 1e-4, 61)]
    found = water_filling(variances, 200, side=8)
    for bits in found:
        assert (np.diff(bits) <= 0).all()
        assert all((bits == b).sum() % 8 == 0 for b in range(1, BITS + 1))
    assert found[0].sum() > found[1].sum()
    spent = sum(bits.sum() + 8 * len(set(bits.tolist()) - {0}) for bits in found)
    assert 180 <= spent <= 200
