import numpy as np
import pytest
import torch

from spectral_kv.metrics.recovered_mass import recovered_mass


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_equals_loops(make, rng):
    weights = rng.random((6, 4, 30)).astype(np.float32)
    kept = np.sort(np.stack([rng.permutation(30)[:12] for _ in range(2)]), axis=1)
    expected = [[sum(weights[h, p, t] for t in kept[h // 3]) for p in range(4)] for h in range(6)]
    np.testing.assert_allclose(np.asarray(recovered_mass(make(weights), make(kept))), expected, rtol=1e-5)


def test_everything_kept_recovers_everything(rng):
    weights = rng.random((4, 3, 20)).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(recovered_mass(weights, np.tile(np.arange(20), (2, 1))), 1, rtol=1e-6)
