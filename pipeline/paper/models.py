"""Several models side by side: a verdict on every claim by model, and how far their orders of methods agree."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from pipeline.paper import published
from pipeline.paper.agreement import agreement
from pipeline.paper.beside import PUBLISHED, Published
from pipeline.paper.claims import COUNTED, Verdict
from pipeline.paper.finished import FinishedRun
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.recency import margins, pruned
from pipeline.paper.table import MISSING, Table, cell, flat, number
from pipeline.statistics import FEWEST, LEVEL, holm


@dataclass(frozen=True)
class ModelResults:
    """What was measured on one model.

    Parameters
    ----------
    title : str
        What tables call it: with what its weights were rounded to.
    documents : str
        The windows of the published comparison.
    verdicts : list of Verdict
        On the claims whose runs are there.
    """

    title: str
    documents: str
    sections: list[MeasuredSection]
    verdicts: list[Verdict]

    @cached_property
    def runs(self) -> dict[str, FinishedRun]:
        """Methods at one budget on one set of documents, without the oracles, which foresee."""
        return {m: run for m, run in pruned(self.sections).items() if not m.startswith("oracle")}

    def values(self, metric: str, methods: list[str]) -> np.ndarray:
        """`[methods, documents]` of the documents that have the metric with every method."""
        columns = [self.runs[m].documents[metric] for m in methods]
        return pd.concat(columns, axis=1).dropna().to_numpy(dtype=float).T


def verdict_matrix(models: list[ModelResults]) -> Table:
    """One line a claim, one column a model."""
    verdicts = {model.title: {v.id: v for v in model.verdicts} for model in models}
    written = {v.id: v for model in models for v in model.verdicts}
    numbers, cells = [], []
    for claim in written.values():
        by = {title: found.get(claim.id) for title, found in verdicts.items()}
        line: dict[str, object] = {"id": claim.id, "from": claim.source, "claim": claim.statement}
        printed = {"from": claim.source, "claim": claim.statement}
        for title, verdict in by.items():
            line |= {title: verdict and verdict.verdict, f"{title}: p": verdict and verdict.p}
            line[f"{title}: decided by"] = verdict and verdict.deciding
            printed[title] = verdict.verdict if verdict else MISSING
        said = {verdict.verdict for verdict in by.values() if verdict}
        printed["alike"] = MISSING if None in by.values() else "yes" if len(said) == 1 else "no"
        numbers.append(line)
        cells.append(printed)
    note = (
        "Each model's claims are decided as in its own document: on its own windows, after Holm over its tests and its "
        "claims. What is undecided on one model and decided on the other need not differ between them."
    )
    return Table("models_verdicts", "Verdicts by model", pd.DataFrame(numbers), pd.DataFrame(cells), note)


def published_beside(spec: Published, models: list[ModelResults]) -> Table:
    """A published column beside every model, in the published order, then the methods that were not published."""
    theirs = published.table("throughput" if spec.name == "match" else spec.name)
    there = dict.fromkeys(m for model in models for m in model.runs if spec.metric in model.runs[m].documents)
    ordered = sorted(
        (m for m in theirs if m in there and spec.column in theirs[m]),
        key=lambda m: theirs[m][spec.column] * (-1 if spec.higher else 1),
    )
    numbers, cells, origins = [], [], []
    for method in [*ordered, *(m for m in there if m not in ordered)]:
        value = theirs.get(method, {}).get(spec.column)
        name = next(model.runs[method].title for model in models if method in model.runs)
        line: dict[str, object] = {"option": method, "method": name, "published": value}
        printed = {"method": name, "published": number(value, spec.pattern)}
        for model in models:
            run = model.runs.get(method)
            found = run and run.estimate(spec.metric)
            line |= flat(model.title, found) | {f"{model.title}: run": run and run.run_id}
            printed[model.title] = cell(found, spec.pattern)
        numbers.append(line)
        cells.append(printed)
        origins.append({model.title: model.runs[method].run_id for model in models if method in model.runs})
    note = f"{spec.metric} of each model on its own windows; published: {published.card()['source']['setting']}."
    return Table(f"models_{spec.name}", spec.title, pd.DataFrame(numbers), pd.DataFrame(cells), note, origins)


def metrics_of(one: ModelResults, other: ModelResults) -> dict[str, list[str]]:
    """The metrics that tell methods apart on two models, each with the methods that have it on both; no bytes."""
    found: dict[str, list[str]] = {}
    for method in (m for m in one.runs if m in other.runs and m != "full"):
        for metric in one.runs[method].documents:
            if metric in other.runs[method].documents and not metric.startswith((COUNTED, "audit/")):
                found.setdefault(metric, []).append(method)
    return {metric: methods for metric, methods in found.items() if len(methods) > 2}


@dataclass(frozen=True)
class Pairs:
    """Pairs of methods whose order is established on both models: by a paired t-test on each, after Holm over all."""

    alike: list[tuple[str, str]]
    opposite: list[tuple[str, str]]  # the first is lower on the first model, and higher on the second


def established(ours: np.ndarray, theirs: np.ndarray, methods: list[str]) -> Pairs:
    """Orders of pairs of `methods` that are sure on both models, from `[methods, documents]` of each."""
    one, other = np.triu_indices(len(methods), 1)
    if min(ours.shape[1], theirs.shape[1]) < FEWEST:
        return Pairs([], [])
    gaps = [x[one] - x[other] for x in (ours, theirs)]
    p = np.ones((2, len(one)))
    for chance, gap in zip(p, gaps, strict=True):
        # the same difference in every document tells nothing of others
        differ = np.ptp(gap, axis=1) > 1e-12 * np.abs(gap).max(axis=1)
        chance[differ] = ttest_1samp(gap[differ], 0.0, axis=1).pvalue
    sure = (holm(p.ravel()).reshape(p.shape) <= LEVEL).all(axis=0)
    first, second = (np.sign(gap.mean(axis=1)) for gap in gaps)
    named = [(methods[a], methods[b]) for a, b in zip(one, other, strict=True)]
    alike = [pair for pair, yes in zip(named, sure & (first == second), strict=True) if yes]
    turned = [
        (a, b) if sign < 0 else (b, a)
        for (a, b), sign, yes in zip(named, first, sure & (first == -second), strict=True)
        if yes
    ]
    return Pairs(alike, turned)


def ranks(models: list[ModelResults]) -> Table:
    """Kendall's tau between the orders of every two models, for every metric that tells methods apart."""
    numbers, cells, origins = [], [], []
    for one, other in combinations(models, 2):
        for metric, methods in metrics_of(one, other).items():
            ours, theirs = (model.values(metric, methods) for model in (one, other))
            found, pairs = agreement(ours, theirs), established(ours, theirs, methods)
            if np.isnan(found.tau.mean):
                continue
            about = {"models": f"{one.title}, {other.title}", "metric": metric, "methods": len(methods)}
            sure = {"pairs_alike": len(pairs.alike), "pairs_opposite": len(pairs.opposite)}
            count = len(methods) * (len(methods) - 1) // 2
            numbers.append(about | flat("tau", found.tau) | {"p": found.p, "pairs": count} | sure)
            cells.append(
                about
                | {
                    "tau": cell(found.tau, "{:+.2f}"), "p": f"{found.p:.1g}",
                    "sure pairs: alike, opposite": f"{len(pairs.alike)}, {len(pairs.opposite)} of {count}",
                }
            )  # fmt: skip
            behind = " ".join(model.runs[method].run_id for model in (one, other) for method in methods)
            origins.append(dict.fromkeys(cells[-1].keys() - about.keys(), behind))
    table = pd.DataFrame(cells)
    if len(models) == 2 and len(table):
        table = table.drop(columns="models")
    note = (
        "1 is the same order of methods on both models, 0 no relation, -1 the reverse; the interval is over "
        "the windows of both, p of no relation, not corrected. Sure pairs: two methods whose order is established on "
        "both models, by paired t-tests after Holm over the metric's."
    )
    title = "Do both models order the methods alike?"
    return Table("models_ranks", title, pd.DataFrame(numbers), table, note, origins)


def changes(models: list[ModelResults]) -> list[str]:
    """What differs between every two models, a sentence a finding."""
    said = []
    for one, other in combinations(models, 2):
        ours, theirs = ({v.id: v for v in model.verdicts} for model in (one, other))
        both = [claim for claim in ours if claim in theirs]
        moved = [claim for claim in both if ours[claim].verdict != theirs[claim].verdict]
        names = f"{one.title} and {other.title}"
        if both:
            listed = "; ".join(f"{ours[c].source} ({ours[c].verdict}, {theirs[c].verdict})" for c in moved)
            said.append(
                f"**Verdicts** of {names}: {len(both) - len(moved)} of {len(both)} alike"
                + (f". Others: {listed}." if moved else ".")
            )
        for metric, about in margins().items():
            methods = metrics_of(one, other).get(metric, [])
            if not methods:
                continue
            values = [model.values(metric, methods) for model in (one, other)]
            found, pairs = agreement(*values), established(*values, methods)
            turned = "; ".join(f"{one.runs[a].title} and {one.runs[b].title}" for a, b in pairs.opposite)
            said.append(
                f"**{about['label']}** of {len(methods)} methods on {names}: tau {cell(found.tau, '{:+.2f}')}; of the "
                f"pairs whose order is sure on both, {len(pairs.alike)} agree and {len(pairs.opposite)} are opposite"
                + (f" (lower first on {one.title}: {turned})." if turned else ".")
            )
    return said


@dataclass(frozen=True)
class OverModels:
    """The section over models, ready to be printed."""

    models: list[ModelResults]
    changes: list[str]
    tables: list[Table]

    @property
    def matrix(self) -> Table:
        return self.tables[0]


def over_models(models: list[ModelResults]) -> OverModels:
    """The section over models, first of all the matrix of verdicts."""
    beside = [published_beside(spec, models) for spec in PUBLISHED]
    tables = [verdict_matrix(models), ranks(models), *(table for table in beside if len(table.cells))]
    return OverModels(models, changes(models), tables)


SHOWN = (
    "memory/ratio", "memory/mb", "aop/mean", "mass/mean", "ppl/nd", "ppl/kl", "ppl/top1", "drift/aop_line",
    "match/percent", "retrieval/recall", "retrieval/full_recall", "retrieval/kept", "throughput/speedup",
    "throughput/tok_s", "planted/recall", "time/total_s",
)  # fmt: skip
TAGS = (
    "hash.model", "hash.document", "hash.code", "identity", "git.revision", "hardware", "version.torch",
    "version.transformers",
)  # fmt: skip


def runs_table(models: list[ModelResults]) -> pd.DataFrame:
    """A line a run of every model and section: settings, main metrics with their intervals, hashes, machine."""
    lines = []
    for model in models:
        for section in model.sections:
            for run in section.runs:
                choice = " ".join(f"{key}={value}" for key, value in run.choice.items())
                about = {"model": model.title, "section": section.experiment, "method": run.title, "choice": choice}
                values: dict[str, object] = {}
                for metric in SHOWN:
                    if (found := run.estimate(metric)) is not None:
                        values |= flat(metric, found)
                lines.append(about | {"documents": run.count} | values | {t: run.tags.get(t) for t in TAGS})
                lines[-1]["run"] = run.run_id
    return pd.DataFrame(lines).dropna(axis="columns", how="all")
