import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_log_mass, attention_weights
from spectral_kv.metrics.recovered_mass import recovered_mass


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_is_the_weight_of_the_kept_tokens(make, rng):
    queries, keys = rng.normal(size=(6, 4, 8)).astype(np.float32), rng.normal(size=(2, 30, 8)).astype(np.float32)
    kept = np.sort(np.stack([rng.permutation(30)[:12] for _ in range(2)]), axis=1)
    weights = attention_weights(queries, keys, 0.7)
    expected = [[sum(weights[h, p, t] for t in kept[h // 3]) for p in range(4)] for h in range(6)]
    ours = np.take_along_axis(keys, kept[..., None], axis=1)
    masses = (attention_log_mass(make(queries), make(k), 0.7) for k in (ours, keys))
    np.testing.assert_allclose(np.asarray(recovered_mass(*masses)), expected, rtol=1e-5)


def test_everything_kept_recovers_everything(rng):
    log_mass = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(recovered_mass(log_mass, log_mass), 1)
