"""The sentences at the top, on runs whose differences to the latest tokens are known."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from pipeline.paper.recency import BETTER, EQUAL, OPEN, WORSE, comparisons, margins, sentences, summary, table
from pipeline.statistics import estimate, holm

WINDOWS = 20


@pytest.fixture
def runs(made, rng):
    """AOP of the latest tokens is near 1; the others differ from it by a mean and a spread of their own."""
    base = 1 + 0.1 * rng.normal(size=WINDOWS)
    spreads = {
        "tri": (-0.2, 0.05),
        "wavelet": (0.3, 0.05),
        "wavelet_tri": (0.0, 0.005),
        "fourier": (0.03, 0.3),
        "full": (-1, 0.1),
        "turboquant": (-0.9, 0.1),
        "oracle_value": (-0.5, 0.1),
    }
    drawn = {m: mean + spread * standard(rng) for m, (mean, spread) in spreads.items()}
    values = {"streaming": base, **{m: base + difference for m, difference in drawn.items()}}
    return {m: made(m, {"aop/mean": list(v)}) for m, v in values.items()}


def standard(rng) -> np.ndarray:
    """Values with a mean of exactly 0 and a deviation of exactly 1."""
    values = rng.normal(size=WINDOWS)
    return (values - values.mean()) / values.std(ddof=1)


def test_better_worse_equal_and_undecided(runs):
    found = {one.method: one for one in comparisons(runs)}
    verdicts = {m: one.verdict for m, one in found.items()}
    assert verdicts == {"tri": BETTER, "wavelet": WORSE, "wavelet_tri": EQUAL, "fourier": OPEN}  # and nothing else
    assert found["tri"].value.mean == pytest.approx(-0.2)
    assert found["tri"].better_on == WINDOWS
    values = {m: runs[m].documents["aop/mean"] - runs["streaming"].documents["aop/mean"] for m in found}
    adjusted = holm(ttest_1samp(v, 0).pvalue for v in values.values())
    assert [one.p for one in found.values()] == pytest.approx(list(adjusted))


def test_a_difference_and_an_equality_have_to_survive_holm_over_the_table(made, rng):
    """Alone each would be established; among ten of its kind it is chance."""
    base = 1 + 0.1 * rng.normal(size=WINDOWS)
    root = np.sqrt(WINDOWS)
    drawn = {
        "tri": -0.1 + 0.1 * root / 2.5 * standard(rng),
        "fourier": 0.01 * (1 - 2 / 4) + 0.01 * root / 4 * standard(rng),
    }
    others = {name: 0.5 * standard(rng) for name in ("knorm", "keydiff", "tova", "snapkv", "h2o", "wavelet", "random")}

    def judged(differences: dict) -> dict:
        values = {"streaming": base, **{m: base + d for m, d in differences.items()}}
        found = comparisons({m: made(m, {"aop/mean": list(v)}) for m, v in values.items()})
        return {one.method: one.verdict for one in found}

    assert [judged({m: drawn[m]})[m] for m in drawn] == [BETTER, EQUAL]
    among = judged({**drawn, **others})
    assert (among["tri"], among["fourier"]) == (OPEN, OPEN)


def test_the_top_says_who_beats_the_latest_tokens_and_by_how_much(runs):
    found = comparisons(runs)
    assert summary(found) == (
        "Of the 4 published methods that prune, keeping the latest tokens is beaten by TriAttentionKV on AOP. "
        "The other 3 beat it on nothing measured here."
    )
    (said,) = sentences(found, runs)
    gain = estimate(runs["tri"].documents["aop/mean"] - runs["streaming"].documents["aop/mean"])
    assert f"better: TriAttentionKV -0.200 [{gain.low:+.3f}, {gain.high:+.3f}]; worse: WaveletKV +0.300 [" in said
    assert "; equal within 0.01: WaveletTriAttn" in said and "; undecided: FourierKV +0.030 [" in said
    assert said.startswith("**AOP** (StreamingLLM ")


def test_where_nobody_beats_them_that_is_said(runs):
    left = {m: run for m, run in runs.items() if m != "tri"}
    found = comparisons(left)
    assert summary(found) == "None of the 3 published methods that prune beats keeping the latest tokens on AOP."
    assert "better: none; worse: WaveletKV" in sentences(found, left)[0]


def test_without_the_latest_tokens_nothing_is_said(runs):
    del runs["streaming"]
    assert comparisons(runs) == []


def test_the_table_has_both_tests(runs):
    made = table(comparisons(runs))
    line = made.numbers.set_index("method").loc["WaveletTriAttn"]
    assert line["margin"] == margins()["aop/mean"]["margin"] and line["equivalence_p_holm"] < 0.05
    assert -0.01 < line["low_90"] < line["high_90"] < 0.01
    assert made.cells["better on"].iloc[0] == "20 of 20"
