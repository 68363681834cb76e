import numpy as np
import pytest
from scipy.stats import kendalltau

from pipeline.paper.agreement import agreement, kendall


def test_tau_is_that_of_scipy_ties_included(rng):
    for _ in range(20):
        ours, theirs = rng.integers(4, size=6).astype(float), rng.integers(4, size=6).astype(float)
        assert kendall(ours, theirs) == pytest.approx(kendalltau(ours, theirs).statistic, nan_ok=True)


def test_tau_by_hand(made):
    """wavelet < wavelet_tri < wavelet_fourier is published; ours swaps the last two: two of three pairs agree."""
    means = {"wavelet": 0.1, "wavelet_tri": 0.3, "wavelet_fourier": 0.2}
    noise = np.linspace(-0.01, 0.01, 8)
    runs = {m: made(m, {"aop/mean": list(v + noise)}) for m, v in means.items()}
    value = agreement(runs, "aop/mean", "perturbation", "mean")
    assert value.mean == pytest.approx((2 - 1) / 3)
    assert value.low == value.high == pytest.approx(1 / 3)  # equal noise: every resample has the same order
    assert np.isnan(agreement({"wavelet": runs["wavelet"]}, "aop/mean", "perturbation", "mean").mean)
