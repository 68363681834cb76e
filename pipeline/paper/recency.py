"""The main result in words: who beats keeping the latest tokens, on which metric, and by how much."""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import pandas as pd
import yaml

from pipeline.paper.finished import FinishedRun
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.table import MISSING, Table, flat
from pipeline.show.summary import spread
from pipeline.statistics import LEVEL, Equivalence, Estimate, differences, equivalence, estimate, holm, p_value

RECENCY = "streaming"
OUTSIDE = ("full", "turboquant", RECENCY)  # what keeps every token spends more bytes than the latest ones do
BETTER, WORSE, EQUAL, OPEN = "better", "worse", "equal", "open"
PUBLISHED = ("fourier", "wavelet", "wavelet_fourier", "wavelet_tri", "tri")


@dataclass(frozen=True)
class Comparison:
    """A method beside StreamingLLM at the same budget: the mean paired difference, below 0 if the method is better.

    Parameters
    ----------
    p, equal_p : float
        Of a difference, and of the equivalence test; each after Holm over all comparisons.
    """

    method: str
    title: str
    metric: str
    value: Estimate
    p: float
    equivalence: Equivalence
    better_on: int  # windows
    windows: int
    run_ids: str  # of the method and of StreamingLLM
    equal_p: float = 1.0

    @property
    def verdict(self) -> str:
        if self.p <= LEVEL and (self.value.high < 0 or self.value.low > 0):
            return BETTER if self.value.high < 0 else WORSE
        return EQUAL if self.equal_p <= LEVEL else OPEN


@cache
def margins() -> dict[str, dict]:
    """Label and margin of every metric that is compared, with its date and reason."""
    return yaml.safe_load(files("pipeline.paper").joinpath("margins.yaml").read_text(encoding="utf-8"))


def pruned(sections: list[MeasuredSection]) -> dict[str, FinishedRun]:
    """The runs at one budget on the documents of the published comparison, by method; those of others beside them."""
    there = {section.experiment: section for section in sections if not section.withheld}
    found: dict[str, FinishedRun] = {}
    for experiment in ("paper", "baselines"):
        own = {run.method: run for run in there[experiment].runs} if experiment in there else {}
        documents = {run.tags["hash.document"] for run in (*found.values(), *own.values())}
        if len(documents) == 1:
            found = own | found
    return found


def comparisons(runs: dict[str, FinishedRun]) -> list[Comparison]:
    """Every method that prunes, on every metric; none if the latest tokens were not measured.

    Parameters
    ----------
    runs : dict of str to FinishedRun
        By method, on the same documents, at one budget.
    """
    if RECENCY not in runs:
        return []
    found = []
    for metric, about in margins().items():
        for method, run in runs.items():
            if method in OUTSIDE or method.startswith("oracle") or metric not in run.documents:
                continue
            values = differences(run.documents[metric], runs[RECENCY].documents[metric])
            margin = equivalence(values, about["margin"])
            found.append(
                Comparison(
                    method, run.title, metric, estimate(values), p_value(values), margin, int((values < 0).sum()),
                    len(values), f"{run.run_id} {runs[RECENCY].run_id}",
                )
            )  # fmt: skip
    corrected = zip(found, holm(one.p for one in found), holm(one.equivalence.p for one in found), strict=True)
    return [replace(one, p=float(p), equal_p=float(equal_p)) for one, p, equal_p in corrected]


def _listed(found: list[Comparison]) -> str:
    ordered = sorted(found, key=lambda one: one.value.mean)
    return ", ".join(f"{one.title} {spread(one.value, '{:+.3f}')}" for one in ordered)


def _joined(titles: list[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"


def summary(found: list[Comparison]) -> str:
    """One sentence: which published methods beat the latest tokens on anything."""
    published = [one for one in found if one.method in PUBLISHED]
    wins = [one for one in published if one.verdict == BETTER]
    if not published:
        return ""
    methods = len({one.method for one in published})
    if not wins:
        labels = _joined([margins()[metric]["label"] for metric in dict.fromkeys(one.metric for one in published)])
        return f"None of the {methods} published methods that prune beats keeping the latest tokens on {labels}."
    by_metric = {m: [one for one in wins if one.metric == m] for m in dict.fromkeys(one.metric for one in wins)}
    parts = [f"{_joined([one.title for one in own])} on {margins()[m]['label']}" for m, own in by_metric.items()]
    rest = methods - len({one.method for one in wins})
    others = "" if rest == 0 else f" The other {rest} beat it on nothing measured here."
    beaten = f"keeping the latest tokens is beaten by {'; '.join(parts)}."
    return f"Of the {methods} published methods that prune, {beaten}{others}"


def sentences(found: list[Comparison], runs: dict[str, FinishedRun]) -> list[str]:
    """One sentence a metric: who is better than the latest tokens, worse, equal, or not to be told apart."""
    said = []
    for metric, about in margins().items():
        own = [one for one in found if one.metric == metric]
        if not own:
            continue
        by = {verdict: [one for one in own if one.verdict == verdict] for verdict in (BETTER, WORSE, EQUAL, OPEN)}
        named = {BETTER: "better", WORSE: "worse", EQUAL: f"equal within {about['margin']:g}", OPEN: "undecided"}
        base = spread(runs[RECENCY].estimate(metric), "{:.3f}")
        nobody = [] if by[BETTER] else ["better: none"]
        parts = nobody + [f"{named[verdict]}: {_listed(by[verdict])}" for verdict in by if by[verdict]]
        said.append(f"**{about['label']}** ({runs[RECENCY].title} {base}) - {'; '.join(parts)}.")
    return said


def table(found: list[Comparison]) -> Table:
    """Every comparison with its test of a difference and its test of equality."""
    words = {BETTER: "better", WORSE: "worse", EQUAL: "equal", OPEN: "undecided"}
    numbers, cells = [], []
    for one in sorted(found, key=lambda one: (list(margins()).index(one.metric), one.value.mean)):
        tested = one.equivalence
        numbers.append(
            {
                "method": one.title, "metric": one.metric, **flat("difference", one.value), "p_holm": one.p,
                "margin": tested.margin, "equivalence_p_holm": one.equal_p, "low_90": tested.low,
                "high_90": tested.high, "better_on": one.better_on, "windows": one.windows, "verdict": one.verdict,
                "run_id": one.run_ids,
            }
        )  # fmt: skip
        within = MISSING if pd.isna(tested.p) else f"[{tested.low:+.3f}, {tested.high:+.3f}], p {one.equal_p:.1g}"
        cells.append(
            {
                "metric": margins()[one.metric]["label"], "method": one.title,
                "- StreamingLLM": spread(one.value, "{:+.3f}"), "p": f"{one.p:.1g}",
                "better on": f"{one.better_on} of {one.windows}", f"90 %, p of being within {tested.margin:g}": within,
                "verdict": words[one.verdict],
            }
        )  # fmt: skip
    note = (
        "Mean paired differences, below 0 where the method is better; both p are after Holm over the table. "
        "Equal: two one-sided tests place the difference within the margin, and the difference is not established. "
        "Margins were chosen when results had been seen: "
        + "; ".join(f"{about['label']} {about['margin']:g}, {about['reason']}" for about in margins().values())
        + "."
    )
    title = "Every method beside keeping the latest tokens (StreamingLLM)"
    return Table("beside_recency", title, pd.DataFrame(numbers), pd.DataFrame(cells), note)
