import numpy as np

from spectral_kv.metrics.perturbation import attention_output_perturbation


def test_perturbation_has_its_anchors(rng):
    full = rng.normal(size=(4, 10, 8))
    np.testing.assert_array_equal(attention_output_perturbation(full, full), 0)
    np.testing.assert_allclose(attention_output_perturbation(np.zeros_like(full), full), 1)
    np.testing.assert_allclose(attention_output_perturbation(1.25 * full, full), 0.25)
    kept = rng.normal(size=full.shape)
    expected = [
        [np.sqrt(((k - f) ** 2).sum() / (f**2).sum()) for k, f in zip(ks, fs, strict=True)]
        for ks, fs in zip(kept, full, strict=True)
    ]
    np.testing.assert_allclose(attention_output_perturbation(kept, full), expected, rtol=1e-9)
