from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau, norm, t, ttest_rel

from pipeline.statistics import (
    aggregate,
    difference,
    differences,
    equivalence,
    estimate,
    holm,
    kendall,
    order,
    p_value,
    paired,
    proportion,
)


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


def test_the_interval_of_few_documents_is_wider_than_plain_percentiles():
    """By Hesterberg's level: of five documents the tail is .0009 instead of .025, so next to the outermost resample."""
    values = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    drawn = np.random.default_rng(1).choice(values, size=(20_000, 5)).mean(1)
    found = estimate(values)
    tail = norm.cdf(np.sqrt(5 / 4) * t.ppf(0.025, 4))
    assert tail == pytest.approx(0.00096, abs=1e-4)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])), abs=0.3)
    assert found.low < np.quantile(drawn, 0.025) - 0.3


def test_no_interval_where_there_can_be_none():
    assert np.isnan(estimate(np.array([1.0])).low)
    assert np.isnan(estimate(np.array([1.0, 2.0, 3.0, 4.0])).low)


def test_equal_values_are_no_certainty():
    """Eight windows with the same value say nothing of the ninth; nor do values that differ by rounding."""
    for values in (np.full(8, 2.0), 2 + 1e-16 * np.arange(8)):
        assert estimate(values).mean == pytest.approx(2) and np.isnan(estimate(values).high)
        assert np.isnan(p_value(values)) and not equivalence(values, 10.0).holds


def test_wilsons_interval_of_a_proportion_by_hand():
    """Of n trials with k hits, z = 1.96: (k + z²/2 ± z sqrt(k (n - k) / n + z²/4)) / (n + z²)."""
    z = 1.959964
    for hits, trials in ((0, 32), (8, 32), (32, 32)):
        value = proportion(np.arange(trials) < hits)
        centre = hits + z**2 / 2
        half = z * np.sqrt(hits * (trials - hits) / trials + z**2 / 4)
        assert value.mean == hits / trials
        assert value.low == pytest.approx(max((centre - half) / (trials + z**2), 0), abs=1e-6)
        assert value.high == pytest.approx(min((centre + half) / (trials + z**2), 1), abs=1e-6)
    assert proportion(np.zeros(32)).high == pytest.approx(0.107, abs=5e-4)  # 0 of 32 is not certainly none


def lookups(hits: np.ndarray) -> pd.DataFrame:
    """Rows of questions `[documents, questions]` and of their documents' means."""
    fine = [
        {"document": d, "depth": q / 4, "metric": "retrieval/recall", "value": float(hit)}
        for d, own in enumerate(hits)
        for q, hit in enumerate(own)
    ]
    whole = [{"document": d, "metric": "retrieval/recall", "value": own.mean()} for d, own in enumerate(hits)]
    return pd.DataFrame(fine + whole).reindex(columns=["document", "layer", "turn", "depth", "metric", "value"])


def test_recall_has_the_wider_of_two_intervals():
    none = aggregate(lookups(np.zeros((8, 4))))["retrieval/recall"]
    assert (none.mean, none.low) == (0, 0) and none.high == pytest.approx(proportion(np.zeros(32)).high)
    clustered = np.repeat(np.arange(8) % 2, 4).reshape(8, 4)  # all right or all wrong, document by document
    value = aggregate(lookups(clustered))["retrieval/recall"]
    over_questions, over_documents = proportion(clustered.ravel()), estimate(clustered.mean(axis=1))
    assert value.mean == 0.5
    assert value.low == over_documents.low < over_questions.low
    assert value.high == over_documents.high > over_questions.high


def test_differences_are_of_the_documents_that_both_have():
    ours = pd.Series([1.0, 2.0, np.nan, 4.0, 5.0, 6.0, 8.0], index=range(7))
    theirs = pd.Series([1.0, 1.0, 1.0, np.nan, 1.0, 1.0, 1.0], index=range(7))
    assert differences(ours, theirs).tolist() == [0, 1, 4, 5, 7]
    assert paired(ours, theirs).mean == 17 / 5
    assert paired(ours, theirs).low < 17 / 5 < paired(ours, theirs).high


def test_p_is_that_of_a_paired_t_test_and_of_the_bound(rng):
    ours, theirs = rng.normal(size=12), rng.normal(size=12)
    assert p_value(ours - theirs) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert p_value(ours, ours.mean()) == pytest.approx(1)
    assert p_value(ours + 5, 0.0) < 1e-6


def test_holm_by_hand():
    """Ranked .01, .02, .03, .04: times 4, 3, 2, 1 are .04, .06, .06, .04, and none may be below one before it."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.001, 0.5, 0.6]) == pytest.approx([0.003, 1.0, 1.0])
    assert holm([0.02, np.nan]) == pytest.approx([0.04, 1.0])  # what can't be tested was asked all the same
    assert len(holm([])) == 0


def test_holm_finds_something_by_chance_in_at_most_five_per_cent(rng):
    """Twenty tests without an effect; uncorrected, 64 % of the families would have a finding."""
    families = rng.uniform(size=(2000, 20))
    assert np.mean([holm(p).min() <= 0.05 for p in families]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(families.min(axis=1) <= 0.05) > 0.5


def test_equivalence_by_hand():
    """Mean .1, standard error .1, 9 values: t of -.5 and .5 are 6 and -4 with 8 degrees; the larger p is that of -4."""
    values = np.array([-1, -1, -1, -1, 0, 1, 1, 1, 1]) * 0.3 + 0.1
    assert values.std(ddof=1) / 3 == pytest.approx(0.1)
    tested = equivalence(values, 0.5)
    assert tested.p == pytest.approx(0.00197, abs=1e-5)
    t_5 = 1.8595  # of 8 degrees
    assert (tested.low, tested.high) == pytest.approx((0.1 - 0.1 * t_5, 0.1 + 0.1 * t_5), abs=1e-4)
    assert tested.holds and not equivalence(values, 0.28).holds
    assert equivalence(values, tested.high).p == pytest.approx(0.05)  # the 90 % interval touches the margin


def test_no_difference_is_not_equality(rng):
    """Values that spread widely around 0: neither different from 0 nor within a small margin of it."""
    values = rng.normal(size=10)
    assert p_value(values - values.mean()) == pytest.approx(1) and not equivalence(values - values.mean(), 0.1).holds


def test_tau_is_that_of_scipy_ties_included(rng):
    for _ in range(20):
        ours, theirs = rng.integers(4, size=6).astype(float), rng.integers(4, size=6).astype(float)
        assert kendall(ours, theirs) == pytest.approx(kendalltau(ours, theirs).statistic, nan_ok=True)


def ordered(means: list[float]) -> list[np.ndarray]:
    noise = np.linspace(-0.01, 0.01, 8)
    return [mean + noise for mean in means]


def test_an_order_is_tested_by_all_its_permutations():
    """One swap of neighbours of four: of 24 orders the three with one swap and the one with none agree as well."""
    theirs = np.array([1.0, 2.0, 3.0, 4.0])
    found = order(ordered([1, 3, 2, 4]), theirs)
    assert found.tau.mean == pytest.approx((5 - 1) / 6)
    assert found.tau.low == found.tau.high == pytest.approx(4 / 6)  # equal noise: every resample has the same order
    better = [p for p in permutations(theirs) if kendalltau(p, theirs).statistic >= 4 / 6 - 1e-9]
    assert found.same == pytest.approx(len(better) / 24) == pytest.approx(4 / 24)
    assert order(ordered([1, 2, 3, 4]), theirs).same == pytest.approx(1 / 24)
    assert order(ordered([4, 3, 2, 1]), theirs).reverse == pytest.approx(1 / 24)
    assert np.isnan(order(ordered([1]), theirs[:1]).tau.mean)


def test_one_binary_split_is_no_order():
    """One method apart from five equal ones, as a table of ratios has it: one way in six to be apart agrees."""
    theirs = np.array([7.1, 7.1, 7.1, 7.1, 7.1, 1.0])
    found = order([np.full(8, v) for v in (8.0, 8.0, 8.0, 8.0, 8.0, 3.5)], theirs)
    assert found.tau.mean == 1 and found.same == pytest.approx(1 / 6)  # tau of 1, and nothing established


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
