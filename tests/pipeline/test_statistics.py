import numpy as np
import pandas as pd
import pytest

from pipeline.statistics import aggregate, difference, estimate


def test_the_mean_is_over_documents_and_ignores_finer_rows():
    rows = pd.DataFrame(
        [{"document": d, "metric": "x", "value": v} for d, v in enumerate([1.0, 2.0, 6.0, 2.0, 4.0])]
        + [{"document": 0, "layer": 1.0, "metric": "x", "value": 100.0}]
        + [{"document": 0, "turn": 1.0, "metric": "x", "value": 100.0}]
        + [{"document": 0, "metric": "of one document", "value": 7.0}]
    )
    value = aggregate(rows)["x"]
    assert value.mean == 3
    assert 1 <= value.low < 3 < value.high <= 6
    assert aggregate(rows)["of one document"].mean == 7


def test_what_is_no_number_is_not_averaged_away():
    rows = pd.DataFrame(
        [{"document": d, "layer": None, "turn": None, "metric": "x", "value": v} for d, v in [(0, 1.0), (1, np.nan)]]
    )
    assert np.isnan(aggregate(rows)["x"].mean)


def test_the_interval_is_about_two_standard_errors_wide(rng):
    values = rng.normal(size=400)
    value = estimate(values)
    assert value.high - value.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert value.low < values.mean() < value.high


def test_no_interval_where_there_can_be_none():
    assert np.isnan(estimate(np.array([1.0])).low)
    assert np.isnan(estimate(np.array([1.0, 2.0, 3.0, 4.0])).low)
    assert estimate(np.array([2.0, 2.0, 2.0])).high == 2


@pytest.mark.slow
@pytest.mark.parametrize("documents", [8, 16, 40])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(documents, skewed):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(500):
        easy = rng.normal(size=documents)
        noise = rng.gamma(4, size=documents) / 2 - 2 if skewed else rng.normal(size=documents)
        value = difference(easy + 0.3 + noise, easy)
        covered += value.low <= 0.3 <= value.high
    assert 0.92 <= covered / 500 <= 0.98
