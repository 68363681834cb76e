import numpy as np
import pytest

from pipeline.paper.claims import NOT_SUPPORTED, SUPPORTED, TESTS, UNDECIDED, claims, decide
from pipeline.statistics import difference

NOISE = np.array([0.03, -0.02, 0.01, -0.03, 0.02, -0.01, 0.02, -0.02])  # sums to 0


def verdict(runs: dict, test: str, **arguments) -> str:
    claim = {"id": "x", "source": "x", "statement": "x", "tests": [{"test": test, **arguments}]}
    return decide(claim, runs).verdict


@pytest.fixture
def runs(made):
    """AOP of a is 1, of b 2, of c 1 give or take; their own noise differs, so that intervals have a width."""
    values = {"a": 1 + NOISE, "b": 2 + NOISE[::-1], "c": 1 + 5 * np.roll(NOISE, 3)}
    return {m: made(m, {"aop/mean": list(v), "score": list(-v)}) for m, v in values.items()}


def test_the_lowest_is_below_each_other(runs):
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b"]) == SUPPORTED
    assert verdict(runs, "lowest", metric="aop/mean", method="b", among=["a", "c"]) == NOT_SUPPORTED
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b", "c"]) == UNDECIDED


def test_lower_by_a_share(runs):
    for share, expected in ((0.0, SUPPORTED), (0.4, SUPPORTED), (0.6, NOT_SUPPORTED), (0.5, UNDECIDED)):
        assert verdict(runs, "lower", metric="aop/mean", method="a", than="b", share=share) == expected


def test_bounds(runs):
    def about(test: str, value: float) -> str:
        return verdict(runs, test, metric="aop/mean", methods=["a"], value=value)

    assert [about("at_least", v) for v in (0.9, 1.0, 1.1)] == [SUPPORTED, UNDECIDED, NOT_SUPPORTED]
    assert [about("smaller", v) for v in (1.1, 1.0, 0.9)] == [SUPPORTED, UNDECIDED, NOT_SUPPORTED]


def test_a_bound_that_is_met_exactly_is_met(made):
    runs = {"a": made("a", {"memory/ratio": [8.0] * 8})}
    assert verdict(runs, "at_least", metric="memory/ratio", methods=["a"], value=8.0) == SUPPORTED
    assert verdict(runs, "smaller", metric="memory/ratio", methods=["a"], value=8.0) == NOT_SUPPORTED


def test_saved_memory_follows_from_the_ratio(made):
    runs = {"a": made("a", {"memory/ratio": [8.0] * 8})}
    assert runs["a"].documents["memory/saved"].tolist() == [0.875] * 8
    assert verdict(runs, "at_least", metric="memory/saved", methods=["a"], value=0.859) == SUPPORTED


def test_rising_falling_and_stable(made):
    first = 1 + NOISE
    changes = {"up": 0.3, "down": -0.3, "flat": 0.0}
    runs = {
        m: made(m, {"drift/aop_first": list(first), "drift/aop_last": list(first + change + NOISE[::-1])})
        for m, change in changes.items()
    }

    def course(test: str) -> list[str]:
        return [verdict(runs, test, metric="drift/aop_change", methods=[m]) for m in changes]

    assert course("rises") == [SUPPORTED, NOT_SUPPORTED, UNDECIDED]
    assert course("falls") == [NOT_SUPPORTED, SUPPORTED, UNDECIDED]
    assert course("falls_not") == [SUPPORTED, NOT_SUPPORTED, UNDECIDED]
    ends = {"first": "drift/aop_first", "last": "drift/aop_last", "share": 0.05}
    assert [verdict(runs, "stable", methods=[m], **ends) for m in changes] == [NOT_SUPPORTED, NOT_SUPPORTED, SUPPORTED]


def test_none_is_the_best_if_each_is_beaten_somewhere(made):
    high, low = list(2 + NOISE), list(1 + NOISE[::-1])
    runs = {"a": made("a", {"x": low, "y": high}), "b": made("b", {"x": high, "y": low})}
    assert verdict(runs, "none_best", among=["a", "b"], lower=["x", "y"], higher=[]) == SUPPORTED
    assert verdict(runs, "none_best", among=["a", "b"], lower=["x"], higher=["y"]) == NOT_SUPPORTED


def test_few_documents_decide_nothing(made):
    runs = {m: made(m, {"aop/mean": [v, v + 0.1, v - 0.1, v]}) for m, v in (("a", 1.0), ("b", 2.0))}
    assert verdict(runs, "lowest", metric="aop/mean", method="a", among=["b"]) == UNDECIDED


def test_the_deciding_interval_is_the_weakest_link(runs):
    """Supported: that of the closest rival. Not supported: the strongest evidence against."""
    close = {**runs, "d": runs["a"]}
    claim = {"id": "x", "source": "s", "statement": "t", "tests": [
        {"test": "lowest", "metric": "aop/mean", "method": "a", "among": ["b"]},
        {"test": "smaller", "metric": "aop/mean", "methods": ["a"], "value": 1.05},
    ]}  # fmt: skip
    assert decide(claim, close).deciding.startswith("aop/mean of a, below 1.05: 1.000 [")
    against = {**claim, "tests": [{"test": "lowest", "metric": "aop/mean", "method": "b", "among": ["a", "c"]}]}
    value = difference(runs["b"].documents["aop/mean"], runs["a"].documents["aop/mean"])
    assert decide(against, close).deciding == f"aop/mean, b - a: 1.000 [{value.low:.3f}, {value.high:.3f}]"


def test_order(made):
    numbers = {"wavelet": 1, "wavelet_tri": 2, "wavelet_fourier": 3, "fourier": 4, "tri": 5, "turboquant": 6}
    order = {"metric": "aop/mean", "table": "perturbation", "column": "mean"}
    same = {m: made(m, {"aop/mean": list(v + NOISE)}) for m, v in numbers.items()}
    assert verdict(same, "order", **order) == SUPPORTED
    reverse = {m: made(m, {"aop/mean": list(-v + NOISE)}) for m, v in numbers.items()}
    assert verdict(reverse, "order", **order) == NOT_SUPPORTED


def test_speeds_are_judged_by_their_quartiles(made):
    speeds = {"throughput/speedup": 1.0, "throughput/speedup_q25": 0.95, "throughput/speedup_q75": 1.05}
    runs = {"a": made("a", {}, **speeds)}
    assert verdict(runs, "at_least", metric="throughput/speedup", methods=["a"], value=0.9) == SUPPORTED
    assert verdict(runs, "at_least", metric="throughput/speedup", methods=["a"], value=1.0) == UNDECIDED


def test_every_finding_and_every_table_has_a_claim_with_tests_that_exist():
    written = claims()
    assert [c["source"] for c in written[:5]] == [f"Key finding {n}" for n in range(1, 6)]
    assert len({c["id"] for c in written}) == len(written)
    assert {t["test"] for c in written for t in c["tests"]} <= set(TESTS)
    tables = {c["source"] for c in written if c["source"].startswith("Table")}
    assert len(tables) == 5
