"""Claims as data, and the tests that decide them by paired intervals over documents."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files

import numpy as np
import yaml

from pipeline.paper.agreement import agreement
from pipeline.paper.runs import Run
from pipeline.show.summary import spread
from pipeline.statistics import Estimate, difference, estimate

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"

Runs = dict[str, Run]  # by method


@dataclass(frozen=True)
class Evidence:
    """One comparison: what was compared, its interval, what that says, and how far it is from saying otherwise."""

    what: str
    value: Estimate
    verdict: str
    distance: float

    @property
    def text(self) -> str:
        return f"{self.what}: {spread(self.value, '{:.3f}')}"


@dataclass(frozen=True)
class Verdict:
    """A claim with the evidence that decides it."""

    id: str
    source: str
    statement: str
    verdict: str
    deciding: str
    evidence: list[Evidence]

    def as_dict(self) -> dict:
        return asdict(self)


def below(what: str, value: Estimate, bound: float = 0.0) -> Evidence:
    """Whether an interval lies below a bound (supported), not below it (not supported), or on both sides."""
    if value.high < bound:
        return Evidence(what, value, SUPPORTED, bound - value.high)
    if value.low >= bound:
        return Evidence(what, value, NOT_SUPPORTED, value.low - bound)
    return Evidence(what, value, UNDECIDED, 0.0)


def above(what: str, value: Estimate, bound: float = 0.0) -> Evidence:
    """Whether an interval lies above a bound (supported), not above it (not supported), or on both sides."""
    if value.low > bound:
        return Evidence(what, value, SUPPORTED, value.low - bound)
    if value.high <= bound:
        return Evidence(what, value, NOT_SUPPORTED, bound - value.high)
    return Evidence(what, value, UNDECIDED, 0.0)


def _paired(runs: Runs, metric: str, one: str, other: str, factor: float = 1.0) -> Estimate:
    values = [runs[m].documents[metric] for m in (one, other)]
    return difference(values[0], factor * values[1])


def lowest(runs: Runs, metric: str, method: str, among: list[str]) -> list[Evidence]:
    """The method's metric is lower than that of each other method, by paired differences."""
    title = runs[method].title
    return [below(f"{metric}, {title} - {runs[m].title}", _paired(runs, metric, method, m)) for m in among]


def lower(runs: Runs, metric: str, method: str, than: str, share: float) -> list[Evidence]:
    """The method's metric is lower than another's by at least a share of it."""
    factor = "" if share == 0 else f"{1 - share:g} x "
    what = f"{metric}, {runs[method].title} - {factor}{runs[than].title}"
    return [below(what, _paired(runs, metric, method, than, 1 - share))]


def _value(run: Run, metric: str) -> Estimate:
    """The recorded interval, or that of the documents' values."""
    value = run.estimate(metric)
    return value if value is not None else estimate(run.documents[metric])


def at_least(runs: Runs, metric: str, methods: list[str], value: float) -> list[Evidence]:
    """The metric of each method is at least a value."""
    bound = np.nextafter(value, -np.inf)
    return [above(f"{metric} of {runs[m].title}, at least {value:g}", _value(runs[m], metric), bound) for m in methods]


def smaller(runs: Runs, metric: str, methods: list[str], value: float) -> list[Evidence]:
    """The metric of each method is below a value."""
    return [below(f"{metric} of {runs[m].title}, below {value:g}", _value(runs[m], metric), value) for m in methods]


def rises(runs: Runs, metric: str, methods: list[str]) -> list[Evidence]:
    """The metric of each method, a change, is above 0."""
    return [above(f"{metric} of {runs[m].title}", _value(runs[m], metric)) for m in methods]


def falls(runs: Runs, metric: str, methods: list[str]) -> list[Evidence]:
    """The metric of each method, a change, is below 0."""
    return [below(f"{metric} of {runs[m].title}", _value(runs[m], metric)) for m in methods]


def stable(runs: Runs, first: str, last: str, methods: list[str], share: float) -> list[Evidence]:
    """The last value of each method is within a share of its first, by paired differences."""
    found = []
    for m in methods:
        before, after = (runs[m].documents[metric] for metric in (first, last))
        title = runs[m].title
        up = below(f"{last} - {1 + share:g} x {first} of {title}", difference(after, (1 + share) * before))
        down = above(f"{last} - {1 - share:g} x {first} of {title}", difference(after, (1 - share) * before))
        found += [up, down]
    return found


def none_best(runs: Runs, among: list[str], lower: list[str], higher: list[str]) -> list[Evidence]:
    """For each method there is a metric on which another one is better."""
    signs = {**dict.fromkeys(lower, 1), **dict.fromkeys(higher, -1)}
    found = []
    for m in among:
        rivals = []
        for metric, sign in signs.items():
            for other in among:
                if other != m:
                    ours, theirs = (sign * runs[name].documents[metric] for name in (m, other))
                    what = f"{metric}, {runs[other].title} better than {runs[m].title}"
                    rivals.append(below(what, difference(theirs, ours)))
        decided = [e for e in rivals if e.verdict == SUPPORTED] or [e for e in rivals if e.verdict == UNDECIDED]
        found.append((decided or rivals)[0])
    return found


def order(runs: Runs, metric: str, table: str, column: str) -> list[Evidence]:
    """Kendall's tau between our order and the published one is above 0; the interval is over documents."""
    return [above(f"Kendall's tau of {metric} with the published order", agreement(runs, metric, table, column))]


TESTS: dict[str, Callable[..., list[Evidence]]] = {
    "lowest": lowest, "lower": lower, "at_least": at_least, "smaller": smaller, "rises": rises,
    "falls": falls, "falls_not": rises, "stable": stable, "none_best": none_best, "order": order,
}  # fmt: skip


def claims() -> list[dict]:
    """The claims as they are written in `claims.yaml`."""
    return yaml.safe_load(files("pipeline.paper").joinpath("claims.yaml").read_text(encoding="utf-8"))


def decide(claim: dict, runs: Runs) -> Verdict:
    """Run the tests of a claim.

    It is not supported if one piece of evidence is against it, supported if all are for it, and undecided otherwise.
    The deciding evidence is the strongest against, the weakest for, or the first that leaves it open.
    """
    evidence: list[Evidence] = []
    for test in claim["tests"]:
        arguments = {k: v for k, v in test.items() if k != "test"}
        evidence += TESTS[test["test"]](runs, **arguments)
    verdicts = {e.verdict for e in evidence}
    if NOT_SUPPORTED in verdicts:
        verdict = NOT_SUPPORTED
        deciding = max((e for e in evidence if e.verdict == verdict), key=lambda e: e.distance)
    elif UNDECIDED in verdicts:
        verdict = UNDECIDED
        deciding = next(e for e in evidence if e.verdict == verdict)
    else:
        verdict = SUPPORTED
        deciding = min(evidence, key=lambda e: e.distance)
    return Verdict(claim["id"], claim["source"], claim["statement"], verdict, deciding.text, evidence)
