import numpy as np
import pytest
import torch

from spectral_kv.metrics.attention import attention_output, attention_output_perturbation, attention_weights


def loops(queries, keys, values, scaling):
    """Float64, one query at a time."""
    heads, positions, _ = queries.shape
    group = heads // keys.shape[0]
    out = np.zeros((heads, positions, values.shape[-1]))
    for h in range(heads):
        for t in range(positions):
            logits = [scaling * float(np.dot(queries[h, t].astype(float), k)) for k in keys[h // group].astype(float)]
            weights = np.exp(np.array(logits) - max(logits))
            weights /= weights.sum()
            out[h, t] = sum(w * v for w, v in zip(weights, values[h // group].astype(float), strict=True))
    return out


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_output_equals_float64_loops(make, rng):
    queries = rng.normal(size=(6, 5, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 40, 8)).astype(np.float32)
    out = attention_output(make(queries), make(keys), make(values), 0.35)
    np.testing.assert_allclose(np.asarray(out), loops(queries, keys, values, 0.35), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(attention_weights(make(queries), make(keys), 0.35)).sum(-1), 1, rtol=1e-5)


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
