import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_mass, attention_output, attention_weights


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


def test_causal_queries_do_not_see_what_follows_them(rng):
    """The queries are those of the last tokens; each row is the softmax over what came before, itself included."""
    queries, keys = rng.normal(size=(4, 5, 8)).astype(np.float32), rng.normal(size=(2, 20, 8)).astype(np.float32)
    weights = attention_weights(queries, keys, 0.3, causal=True)
    for h in range(4):
        for i in range(5):
            seen = 15 + i + 1
            logits = np.exp(0.3 * keys[h // 2, :seen] @ queries[h, i])
            np.testing.assert_allclose(weights[h, i, :seen], logits / logits.sum(), rtol=1e-4)
            assert (weights[h, i, seen:] == 0).all()


def test_mass_is_the_mean_over_positions_and_the_heads_that_share_a_kv_head(rng):
    weights = rng.random((4, 3, 10))
    np.testing.assert_allclose(attention_mass(weights, 2)[1], weights[2:].mean(axis=(0, 1)))
