import numpy as np
import pytest
import scipy.special
import torch

from spectral_kv.metrics.prediction import kl_divergence, log_softmax, negative_log_likelihood, top1_agreement

makers = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


@makers
def test_likelihood_and_divergence_equal_scipy(make, rng):
    full, other = 5 * rng.normal(size=(2, 30, 100)).astype(np.float32)
    targets = rng.integers(0, 100, size=30)
    p, q = (scipy.special.log_softmax(x.astype(float), axis=-1) for x in (full, other))
    nll = negative_log_likelihood(log_softmax(make(full)), make(targets))
    np.testing.assert_allclose(np.asarray(nll), -p[np.arange(30), targets], rtol=1e-5)
    kl = kl_divergence(*(log_softmax(make(x)) for x in (full, other)))
    np.testing.assert_allclose(np.asarray(kl), (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)


@makers
def test_equal_predictions_agree_exactly(make, rng):
    full = log_softmax(make(rng.normal(size=(30, 100)).astype(np.float32)))
    assert float(kl_divergence(full, full).max()) == 0
    assert float(top1_agreement(full, full).min()) == 1


@makers
def test_agreement_counts_equal_argmaxima(make):
    full = make(np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=np.float32))
    other = make(np.array([[9.0, 10.0, 1.0], [0.0, 2.0, 1.0]], dtype=np.float32))
    assert np.asarray(top1_agreement(full, other)).tolist() == [1, 0]
