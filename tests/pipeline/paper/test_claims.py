from datetime import date

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from pipeline.paper.claims import CONTRADICTED, SUPPORTED, TESTS, UNDECIDED, claims, decide, judge, needs
from pipeline.paper.document import tally
from pipeline.statistics import difference

NOISE = np.array([0.03, -0.02, 0.01, -0.03, 0.02, -0.01, 0.02, -0.02])  # sums to 0


def claim(*tests: dict, **more) -> dict:
    return {"id": "x", "source": "s", "statement": "t", "metric": "m", "tests": list(tests), **more}


def verdict(runs: dict, test: str, **arguments) -> str:
    return decide(claim({"test": test, **arguments}), {"paper": runs}).verdict


@pytest.fixture
def runs(made):
    """AOP of a is 1, of b 2, of c 1 give or take; their own noise differs, so that intervals have a width."""
    values = {"a": 1 + NOISE, "b": 2 + NOISE[::-1], "c": 1 + 5 * np.roll(NOISE, 3)}
    return {m: made(m, {"aop/mean": list(v), "score": list(-v)}) for m, v in values.items()}


def test_the_lowest_is_below_each_other(runs):
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b"]) == SUPPORTED
    assert verdict(runs, "lowest", metric="aop/mean", method="b", among=["a", "c"]) == CONTRADICTED
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b", "c"]) == UNDECIDED


def test_lower_by_a_share(runs):
    for share, expected in ((0.0, SUPPORTED), (0.4, SUPPORTED), (0.6, CONTRADICTED), (0.5, UNDECIDED)):
        assert verdict(runs, "lower", metric="aop/mean", method="a", than="b", share=share) == expected


def test_bounds(runs):
    def about(test: str, value: float) -> str:
        return verdict(runs, test, metric="aop/mean", methods=["a"], value=value)

    assert [about("at_least", v) for v in (0.9, 1.0, 1.1)] == [SUPPORTED, UNDECIDED, CONTRADICTED]
    assert [about("smaller", v) for v in (1.1, 1.0, 0.9)] == [SUPPORTED, UNDECIDED, CONTRADICTED]


def test_bytes_are_counted_and_a_bound_that_they_meet_exactly_is_met(made):
    runs = {"a": made("a", {"memory/ratio": [8.0] * 8})}
    assert verdict(runs, "at_least", metric="memory/ratio", methods=["a"], value=8.0) == SUPPORTED
    assert verdict(runs, "smaller", metric="memory/ratio", methods=["a"], value=8.0) == CONTRADICTED


def test_what_is_sampled_and_does_not_spread_decides_nothing(made):
    runs = {"a": made("a", {"retrieval/recall": [0.0] * 8})}
    assert verdict(runs, "smaller", metric="retrieval/recall", methods=["a"], value=0.5) == UNDECIDED


def test_saved_memory_follows_from_the_ratio(made):
    runs = {"a": made("a", {"memory/ratio": [8.0] * 8})}
    assert runs["a"].documents["memory/saved"].tolist() == [0.875] * 8
    assert verdict(runs, "at_least", metric="memory/saved", methods=["a"], value=0.859) == SUPPORTED


TURNS = [{"document": 0, "turn": turn, "metric": "drift/aop", "value": 1.0} for turn in range(1, 6)]


def drifting(made, slope: np.ndarray, method: str = "a"):
    """A method whose AOP begins near 1 and has five turns with this slope, one a document."""
    values = {"drift/aop_first": list(1 + NOISE), "drift/aop_slope": list(slope)}
    return made(method, values, rows=TURNS)


def test_rising_falling_and_stable_are_judged_by_the_slope(made):
    """Four steps of .05 are 20 % of turn 1, and of .005 are 2 %: less than the margin of 5 %."""
    slopes = {"up": 0.05, "down": -0.05, "little": -0.005, "none": 0.0}
    runs = {m: drifting(made, slope + 0.02 * NOISE[::-1], m) for m, slope in slopes.items()}
    assert runs["up"].documents["drift/aop_line"].mean() == pytest.approx(0.2)

    def course(test: str) -> list[str]:
        return [verdict(runs, test, methods=[m], share=0.05) for m in slopes]

    assert course("rises") == [SUPPORTED, CONTRADICTED, CONTRADICTED, CONTRADICTED]
    assert course("falls") == [CONTRADICTED, SUPPORTED, CONTRADICTED, CONTRADICTED]
    assert course("falls_not") == [SUPPORTED, CONTRADICTED, SUPPORTED, SUPPORTED]
    assert course("stable") == [CONTRADICTED, CONTRADICTED, SUPPORTED, SUPPORTED]


def test_a_drift_of_exactly_0_does_not_count_against_does_not_fall(made):
    assert verdict({"a": drifting(made, np.zeros(8))}, "falls_not", methods=["a"], share=0.05) == SUPPORTED
    wide = 0.0125 + 2 * NOISE  # falls by 5 %, rises by 5 %, or neither
    assert verdict({"a": drifting(made, -wide)}, "falls_not", methods=["a"], share=0.05) == UNDECIDED


def test_none_is_the_best_if_each_is_beaten_somewhere(made):
    high, low = list(2 + NOISE), list(1 + NOISE[::-1])
    runs = {"a": made("a", {"x": low, "y": high}), "b": made("b", {"x": high, "y": low})}
    assert verdict(runs, "none_best", among=["a", "b"], lower=["x", "y"], higher=[]) == SUPPORTED
    assert verdict(runs, "none_best", among=["a", "b"], lower=["x"], higher=["y"]) == CONTRADICTED
    higher = {"a": made("a", {"x": low, "y": low}), "b": made("b", {"x": high, "y": high})}
    assert verdict(higher, "none_best", among=["a", "b"], lower=["x"], higher=["y"]) == SUPPORTED
    equal = {m: made(m, {"x": list(v)}) for m, v in (("a", 1 + NOISE), ("b", 1 + NOISE[::-1]))}
    assert verdict(equal, "none_best", among=["a", "b"], lower=["x"], higher=[]) == UNDECIDED


def test_the_best_is_beaten_by_the_surest_rival_whatever_its_unit(made):
    """On x one rival is just better, on y another is better beyond doubt, in a unit a thousand times as small."""
    a = made("a", {"x": list(1 + 3 * NOISE), "y": list(0.002 + 1e-5 * NOISE)})
    b = made("b", {"x": list(0.75 + 3 * NOISE[::-1]), "y": list(0.001 + 1e-5 * NOISE[::-1])})
    found = decide(claim({"test": "none_best", "among": ["a", "b"], "lower": ["x", "y"], "higher": []}),
                   {"paper": {"a": a, "b": b}})  # fmt: skip
    assert found.evidence[0].what == "y, b - a"
    assert found.evidence[0].verdict == SUPPORTED and found.verdict == CONTRADICTED  # and nothing beats b


def test_being_beaten_once_in_many_comparisons_is_chance(made):
    """b is below a with p of about .02 on one metric of ten, and nobody can be told apart on the others."""
    shift = NOISE.std(ddof=1) / np.sqrt(8) * 3
    own, other = {"x0": list(1 + NOISE + shift)}, {"x0": [1.0] * 8}
    for i in range(1, 10):
        own[f"x{i}"], other[f"x{i}"] = list(1 + NOISE), [1.0] * 8
    runs = {"a": made("a", own), "b": made("b", other)}
    few = decide(claim({"test": "none_best", "among": ["a", "b"], "lower": ["x0"], "higher": []}), {"paper": runs})
    many = decide(claim({"test": "none_best", "among": ["a", "b"], "lower": list(own), "higher": []}), {"paper": runs})
    assert few.evidence[0].verdict == SUPPORTED  # b beats a
    assert many.evidence[0].verdict == UNDECIDED


def test_few_documents_decide_nothing(made):
    runs = {m: made(m, {"aop/mean": [v, v + 0.1, v - 0.1, v]}) for m, v in (("a", 1.0), ("b", 2.0))}
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b"]) == UNDECIDED


def test_the_printed_comparison_is_the_one_that_decides(runs):
    """Supported: the least sure. Contradicted: the surest against. Undecided: one that is open."""
    near = {"test": "smaller", "metric": "aop/mean", "methods": ["a"], "value": 1.03}
    far = {"test": "lowest", "metric": "aop/mean", "method": "a", "among": ["b"]}
    found = decide(claim(far, near), {"paper": runs})
    p = ttest_1samp(1 + NOISE, 1.03).pvalue
    assert found.verdict == SUPPORTED and found.p == pytest.approx(p)
    assert found.deciding.startswith("aop/mean of a, below 1.03: 1.000 [") and found.deciding.endswith(f"p {p:.1g}")
    against = decide(claim({**far, "method": "b", "among": ["a", "c"]}), {"paper": runs})
    value = difference(runs["b"].documents["aop/mean"], runs["a"].documents["aop/mean"])
    assert against.deciding.startswith(f"aop/mean, b - a: 1.000 [{value.low:.3f}, {value.high:.3f}]")
    undecided = decide(claim({**far, "among": ["b", "c"]}), {"paper": runs})
    assert undecided.deciding.startswith("aop/mean, a - c: ")


def test_a_contradiction_has_to_survive_holm_over_the_tests_of_its_claim(made):
    """One of ten bounds is missed with p of about .02: alone that is against the claim, among ten it is chance."""
    values = 1 + NOISE + NOISE.std(ddof=1) / np.sqrt(8) * 3
    p = ttest_1samp(values, 1.0).pvalue
    assert 0.005 < p < 0.05
    runs = {"a": made("a", {"x": list(values)})}
    missed = {"test": "smaller", "metric": "x", "methods": ["a"], "value": 1.0}
    met = {**missed, "value": 2.0}
    assert decide(claim(missed), {"paper": runs}).verdict == CONTRADICTED
    assert decide(claim(missed, *[met] * 9), {"paper": runs}).verdict == UNDECIDED


def test_a_verdict_has_to_survive_holm_over_the_claims(made):
    values = 1 + NOISE - NOISE.std(ddof=1) / np.sqrt(8) * 3
    runs = {"a": made("a", {"x": list(values)})}
    one = claim({"test": "smaller", "metric": "x", "methods": ["a"], "value": 1.0})
    alone, among = judge([one], {"paper": runs})[0], judge([one] * 10, {"paper": runs})
    assert alone.verdict == SUPPORTED and alone.p < 0.05
    assert {v.verdict for v in among} == {UNDECIDED}
    assert among[0].deciding.endswith("after Holm over the claims")
    elsewhere = claim({"test": "smaller", "section": "seeds", "metric": "x", "methods": ["a"], "value": 1.0})
    (beside,) = judge([one, *[elsewhere] * 9], {"paper": runs})
    assert beside.verdict == UNDECIDED  # claims that were not measured count as claims


def test_order(made):
    numbers = {"wavelet": 1, "wavelet_tri": 2, "wavelet_fourier": 3, "fourier": 4, "tri": 5, "turboquant": 6}
    order = {"metric": "aop/mean", "table": "perturbation", "column": "mean"}

    def judged(means: dict) -> str:
        return verdict({m: made(m, {"aop/mean": list(v + NOISE)}) for m, v in means.items()}, "same_order", **order)

    assert judged(numbers) == SUPPORTED
    assert judged({m: -v for m, v in numbers.items()}) == CONTRADICTED
    # tau of .33, which a fifth of all orders reach: above 0, and no evidence
    assert judged({**numbers, "wavelet": 3.5, "wavelet_tri": 4.5, "fourier": 3.2}) == UNDECIDED


def test_claims_about_other_sections_wait_for_them(made):
    default = made("fourier", {"x": list(1 + NOISE)}, choice={"variant": "fourier_default"})
    box = made("fourier", {"x": list(2 + NOISE[::-1])}, choice={"variant": "fourier_box_window"})
    test = {"test": "lower", "section": "ablation", "metric": "x", "share": 0}
    one = claim({**test, "method": "fourier_default", "than": "fourier_box_window"})
    assert needs(one) == {"ablation": {"fourier_default", "fourier_box_window"}}
    assert judge([one], {"paper": {}}) == judge([one], {"ablation": {"fourier_default": default}}) == []
    (found,) = judge([one], {"ablation": {"fourier_default": default, "fourier_box_window": box}})
    assert found.verdict == SUPPORTED
    assert found.deciding.startswith("x, FourierKV - FourierKV (box window): -1.000 [")


def test_a_control_is_printed_beside(made):
    runs = {"a": drifting(made, -0.05 + 0.02 * NOISE), "random": drifting(made, -0.1 + 0.02 * NOISE, "random")}
    test = {"test": "falls", "methods": ["a"], "share": 0.05}
    found = decide(claim(test, control={"metric": "drift/aop_line", "method": "random"}), {"paper": runs})
    assert found.control.startswith("drift/aop_line of random: -0.400 [")


def test_a_fall_that_random_tokens_have_too_is_no_correction(made):
    """A slope of -.05 is a fall by more than a twentieth, and random's is twice that."""
    (written,) = (c for c in claims() if c["id"] == "finding-4")
    slopes = {"wavelet": 0.0, "wavelet_tri": 0.0, "fourier": 0.0, "tri": 0.0, "wavelet_fourier": -0.05}
    for random, expected in ((0.0, SUPPORTED), (-0.1, CONTRADICTED)):
        drawn = {**slopes, "random": random}
        runs = {m: drifting(made, s + 0.005 * np.roll(NOISE, i), m) for i, (m, s) in enumerate(drawn.items())}
        assert decide(written, {"paper": runs}).verdict == expected


def test_no_verdict_hangs_on_speed():
    assert not any("throughput" in str(c["tests"]) or "time" in str(c["tests"]) for c in claims())


def test_every_finding_table_and_improvement_has_a_claim_with_tests_that_exist():
    written = claims()
    assert [c["source"] for c in written[:5]] == [f"Key finding {n}" for n in range(1, 6)]
    assert len({c["id"] for c in written}) == len(written)
    assert {t["test"] for c in written for t in c["tests"]} <= set(TESTS)
    tables = {c["source"] for c in written if c["source"].startswith("Table")}
    assert len(tables) == 4  # that of throughput is in the section on speed, and decides nothing
    assert {c["source"][:13] for c in written if c["source"].startswith("Impr")} == {
        f"Improvement {n}" for n in range(1, 5)
    }


def test_every_bound_that_the_card_does_not_print_has_a_date_and_a_reason():
    printed = {0.18, 7.1, 0}  # 18 % lower, 7.1 times smaller; 0: lower at all
    for written in claims():
        assert written["metric"]
        known = {bound["value"]: bound for bound in written.get("bounds", [])}
        used = {t[key] for t in written["tests"] for key in ("value", "share") if key in t}
        assert used - printed == set(known), written["id"]
        for bound in known.values():
            assert isinstance(bound["date"], date) and bound["reason"] and isinstance(bound["after"], bool)


def test_the_tally_counts_what_was_not_measured(runs):
    verdicts = judge([claim({"test": "lowest", "metric": "aop/mean", "method": "a", "among": ["b"]})], {"paper": runs})
    missing = len(claims()) - 1
    assert tally(verdicts) == (
        f"Of 1 published claims: 1 supported, 0 contradicted, 0 undecided; {missing} not measured."
    )
