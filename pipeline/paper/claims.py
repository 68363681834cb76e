"""Claims as data, and the tests that decide them by paired differences over documents."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
import yaml

from pipeline.paper import published
from pipeline.paper.finished import FinishedRun
from pipeline.paper.recency import margins
from pipeline.show.summary import spread
from pipeline.statistics import LEVEL, Equivalence, Estimate, differences, equivalence, estimate, holm, p_value

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
COUNTED = "memory/"  # metrics that are counted: the same bytes in every document are no sample

Runs = dict[str, FinishedRun]  # by method, or by variant


@dataclass(frozen=True)
class Evidence:
    """One comparison.

    Parameters
    ----------
    value : Estimate
        What was compared, with the interval that decides.
    verdict : str
        What the interval says.
    p : float
        Of the side that the interval is on, or nearer to.
    """

    what: str
    value: Estimate
    verdict: str
    p: float
    equivalence: Equivalence | None = None  # of a difference of a metric that has a margin

    @property
    def text(self) -> str:
        chance = "" if np.isnan(self.p) or self.p == 0 else f", p {self.p:.1g}"
        equal = ""
        if self.verdict == UNDECIDED and self.equivalence is not None and self.equivalence.holds:
            equal = f", equal within {self.equivalence.margin:g} (two one-sided tests, p {self.equivalence.p:.1g})"
        return f"{self.what}: {spread(self.value, '{:.3f}')}{chance}{equal}"


@dataclass(frozen=True)
class Verdict:
    """A claim with the evidence that decides it.

    Parameters
    ----------
    p : float
        After Holm over the claim's tests and over the claims; 1 for an undecided one.
    deciding : str
        The comparison that decides: the one least sure among those that have to hold, or the surest one against.
    after : bool
        Whether one of its bounds was chosen when results had been seen.
    """

    id: str
    source: str
    statement: str
    metric: str
    verdict: str
    p: float
    deciding: str
    control: str | None
    remark: str | None
    bounds: list[dict]
    evidence: list[Evidence]

    @property
    def after(self) -> bool:
        return any(bound["after"] for bound in self.bounds)

    def as_dict(self) -> dict:
        return asdict(self) | {"bounds": [{**b, "date": str(b["date"])} for b in self.bounds]}


def compared(what: str, values: np.ndarray, bound: float, wanted_below: bool, counted: bool = False) -> Evidence:
    """Whether the mean of one value a document lies on the wanted side of a bound, on the other, or can't be told."""
    value, p = estimate(values), p_value(values, bound)
    if counted and len(values):
        value, p = Estimate(value.mean, value.mean, value.mean), 0.0
    below, above = value.high < bound, value.low > bound
    if counted and value.mean == bound:  # "at least" holds at the bound, "below" does not
        below, above = False, True
    for_it, against = (below, above) if wanted_below else (above, below)
    return Evidence(what, value, SUPPORTED if for_it else CONTRADICTED if against else UNDECIDED, p)


def corrected(evidence: list[Evidence], verdict: str) -> list[Evidence]:
    """The evidence with p after Holm where it says `verdict`; what says something else is no evidence of that."""
    adjusted = holm(e.p if e.verdict == verdict else 1.0 for e in evidence)
    return [replace(e, p=float(p)) if e.verdict == verdict else e for e, p in zip(evidence, adjusted, strict=True)]


def _paired(what: str, runs: Runs, metric: str, one: str, other: str, factor: float = 1.0) -> Evidence:
    """Whether one method's metric is below another's, times a factor."""
    values = differences(runs[one].documents[metric], factor * runs[other].documents[metric])
    found = compared(what, values, 0.0, True, metric.startswith(COUNTED))
    if factor != 1.0 or metric not in margins():
        return found
    return replace(found, equivalence=equivalence(values, margins()[metric]["margin"]))


def lowest(runs: Runs, metric: str, method: str, among: list[str]) -> list[Evidence]:
    """The method's metric is lower than that of each other method, by paired differences."""
    name = runs[method].name
    return [_paired(f"{metric}, {name} - {runs[m].name}", runs, metric, method, m) for m in among]


def lower(runs: Runs, metric: str, method: str, than: str, share: float) -> list[Evidence]:
    """The method's metric is lower than another's by at least a share of it."""
    factor = "" if share == 0 else f"{1 - share:g} x "
    what = f"{metric}, {runs[method].name} - {factor}{runs[than].name}"
    return [_paired(what, runs, metric, method, than, 1 - share)]


def _bounded(runs: Runs, metric: str, methods: list[str], value: float, words: str, below: bool) -> list[Evidence]:
    found = []
    for m in methods:
        values = runs[m].documents[metric].dropna().to_numpy()
        what = f"{metric} of {runs[m].name}, {words} {value:g}"
        found.append(compared(what, values, value, below, metric.startswith(COUNTED)))
    return found


def at_least(runs: Runs, metric: str, methods: list[str], value: float) -> list[Evidence]:
    """The metric of each method is at least a value."""
    return _bounded(runs, metric, methods, value, "at least", below=False)


def smaller(runs: Runs, metric: str, methods: list[str], value: float) -> list[Evidence]:
    """The metric of each method is below a value."""
    return _bounded(runs, metric, methods, value, "below", below=True)


def _course(runs: Runs, method: str, share: float, below: bool) -> Evidence:
    """Whether AOP changes over the turns by less than `share` of its first turn, along a least-squares line."""
    own = runs[method].documents
    sign = "-" if share > 0 else "+"
    what = f"drift/aop_line {sign} {abs(share):g} x drift/aop_first of {runs[method].name}"
    return compared(what, differences(own["drift/aop_line"], share * own["drift/aop_first"]), 0.0, below)


def rises(runs: Runs, methods: list[str], share: float) -> list[Evidence]:
    """The AOP of each method rises over the turns, by more than a share of the first."""
    return [_course(runs, m, share, below=False) for m in methods]


def falls(runs: Runs, methods: list[str], share: float) -> list[Evidence]:
    """The AOP of each method falls over the turns, by more than a share of the first."""
    return [_course(runs, m, -share, below=True) for m in methods]


def falls_not(runs: Runs, methods: list[str], share: float) -> list[Evidence]:
    """The AOP of each method does not fall over the turns by more than a share of the first."""
    return [_course(runs, m, -share, below=False) for m in methods]


def stable(runs: Runs, methods: list[str], share: float) -> list[Evidence]:
    """The AOP of each method neither rises nor falls over the turns by more than a share of the first."""
    return [_course(runs, m, sign * share, below=sign > 0) for m in methods for sign in (1, -1)]


def none_best(runs: Runs, among: list[str], lower: list[str], higher: list[str]) -> list[Evidence]:
    """For each method there is a metric on which another one is better: the surest such comparison, after Holm."""
    found = []
    for m in among:
        rivals = []
        for metric in (*lower, *higher):
            for other in (x for x in among if x != m):
                better, worse = (other, m) if metric in lower else (m, other)
                what = f"{metric}, {runs[better].name} - {runs[worse].name}"
                rivals.append(_paired(what, runs, metric, better, worse))
        rivals = corrected(rivals, SUPPORTED)
        beaten = [e for e in rivals if e.verdict == SUPPORTED and e.p <= LEVEL]
        if beaten:
            found.append(min(beaten, key=lambda e: e.p))
        elif all(e.verdict == CONTRADICTED for e in rivals):
            found.append(max(rivals, key=lambda e: e.p))
        else:
            left_open = min((e for e in rivals if e.verdict != CONTRADICTED), key=_doubt)
            found.append(replace(left_open, verdict=UNDECIDED))
    return found


def same_order(runs: Runs, metric: str, table: str, column: str) -> list[Evidence]:
    """Our order agrees with the published one better than chance: a permutation test of Kendall's tau, both sides.

    Its interval over documents must lie on the same side of 0.
    """
    found = published.agreement(runs, metric, table, column)
    value, p = found.tau, min(1.0, 2 * min(found.same, found.reverse))
    if value.low > 0 and p <= LEVEL:
        verdict = SUPPORTED
    elif value.high < 0 and p <= LEVEL:
        verdict = CONTRADICTED
    else:
        verdict = UNDECIDED
    return [Evidence(f"Kendall's tau of {metric} with the published order", value, verdict, p)]


TESTS: dict[str, Callable[..., list[Evidence]]] = {
    "lowest": lowest, "lower": lower, "at_least": at_least, "smaller": smaller, "rises": rises, "falls": falls,
    "falls_not": falls_not, "stable": stable, "none_best": none_best, "same_order": same_order,
}  # fmt: skip


@cache
def claims() -> list[dict]:
    """The claims as they are written in `claims.yaml`."""
    return yaml.safe_load(files("pipeline.paper").joinpath("claims.yaml").read_text(encoding="utf-8"))


def needs(claim: dict) -> dict[str, set[str]]:
    """The sections that decide a claim, and whose runs of them."""
    found: dict[str, set[str]] = {}
    for test in claim["tests"]:
        named = [test[key] for key in ("method", "than") if key in test]
        named += [name for key in ("methods", "among") for name in test.get(key, [])]
        found.setdefault(test.get("section", "paper"), set()).update(named)
    return found


def decide(claim: dict, sections: dict[str, Runs]) -> Verdict:
    """Run the tests of a claim; Holm over its tests, not yet over the claims.

    It is contradicted if a test is against it after Holm over all of them, supported if all are for it, and undecided
    otherwise.
    """
    evidence: list[Evidence] = []
    for test in claim["tests"]:
        arguments = {k: v for k, v in test.items() if k not in ("test", "section")}
        evidence += TESTS[test["test"]](sections[test.get("section", "paper")], **arguments)
    against = [e for e in corrected(evidence, CONTRADICTED) if e.verdict == CONTRADICTED and e.p <= LEVEL]
    if against:
        verdict, deciding = CONTRADICTED, min(against, key=lambda e: e.p)
    elif all(e.verdict == SUPPORTED for e in evidence):
        verdict, deciding = SUPPORTED, max(evidence, key=lambda e: e.p)
    else:
        verdict, deciding = UNDECIDED, max((e for e in evidence if e.verdict != SUPPORTED), key=_doubt)
    control = None
    if "control" in claim:
        metric, method = claim["control"]["metric"], claim["control"]["method"]
        run = sections["paper"].get(method)
        if run is not None and metric in run.documents:
            control = f"{metric} of {run.name}: {spread(estimate(run.documents[metric].dropna()), '{:.3f}')}"
    return Verdict(
        claim["id"], claim["source"], claim["statement"], claim["metric"], verdict,
        1.0 if verdict == UNDECIDED else float(deciding.p), deciding.text, control, claim.get("remark"),
        claim.get("bounds", []), evidence,
    )  # fmt: skip


def _doubt(evidence: Evidence) -> float:
    return 2.0 if np.isnan(evidence.p) else evidence.p


def judge(written: list[dict], sections: dict[str, Runs]) -> list[Verdict]:
    """The verdict on every claim whose runs are there, after Holm over all that are written, measured or not."""
    verdicts = [
        decide(claim, sections)
        for claim in written
        if all(section in sections and names <= set(sections[section]) for section, names in needs(claim).items())
    ]
    found = []
    unmeasured = [1.0] * (len(written) - len(verdicts))
    for verdict, p in zip(verdicts, holm([*(v.p for v in verdicts), *unmeasured]), strict=False):
        if verdict.verdict != UNDECIDED and p > LEVEL:
            text = f"{verdict.deciding}; {p:.1g} after Holm over the claims"
            found.append(replace(verdict, verdict=UNDECIDED, p=1.0, deciding=text))
        else:
            found.append(replace(verdict, p=float(p)))
    return found
