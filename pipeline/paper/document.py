"""The document: tables, figures, claims and their origin, written to a folder."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.paper import published, recency
from pipeline.paper.claims import CONTRADICTED, SUPPORTED, UNDECIDED, Verdict, claims, judge
from pipeline.paper.drawing import Drawn, draw
from pipeline.paper.latex import latex, latex_text
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.models import ModelResults, OverModels, runs_table
from pipeline.paper.provenance import TRACED, Origin, by_choice, hashes, portable, setup, timed, traced
from pipeline.paper.report import page
from pipeline.paper.tables import TABLES, Table

TITLE = "SpectralKV, measured again"


@dataclass(frozen=True)
class Shown:
    """A section as the template prints it."""

    experiment: str
    title: str
    runs: int
    count: int
    command: str
    narrowed: list[str]
    withheld: str | None
    tables: list[Table]
    figures: list[Drawn]


def judged(sections: list[MeasuredSection]) -> list[Verdict]:
    """The verdict on every claim whose runs are there, on as many documents as they should be."""
    return judge(claims(), {s.experiment: by_choice(s) for s in sections if not s.withheld})


def tally(verdicts: list[Verdict]) -> str:
    """How many claims came out which way, in words."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    parts = [f"{counts[name]} {name}" for name in (SUPPORTED, CONTRADICTED, UNDECIDED)]
    missing = len(claims()) - len(verdicts)
    return f"Of {len(verdicts)} published claims: {', '.join(parts)}" + (
        f"; {missing} not measured." if missing else "."
    )


def verdict_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One line a claim, as printed."""
    lines = []
    for v in verdicts:
        said = f"{v.statement}{' †' if v.after else ''}" + (f" *{v.remark}*" if v.remark else "")
        by = v.deciding + (f" ({v.control})" if v.control else "")
        lines.append({"from": v.source, "claim": said, "verdict": f"**{v.verdict}**", "decided by": by})
    return pd.DataFrame(lines)


def _clean(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


@dataclass(frozen=True)
class Document:
    """The document, ready to be written."""

    origin: Origin
    sections: list[MeasuredSection]
    shown: list[Shown]
    verdicts: list[Verdict]
    beside_recency: Table | None
    main_result: list[str]
    over: OverModels | None = None

    @cached_property
    def environment(self) -> Environment:
        return Environment(
            loader=PackageLoader("pipeline.paper", "."), undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip

    @property
    def measured(self) -> list[MeasuredSection]:
        """The sections of all models."""
        return [s for model in self.over.models for s in model.sections] if self.over else self.sections

    @property
    def tables(self) -> list[Table]:
        beside = [self.beside_recency] if self.beside_recency else []
        beside += self.over.tables if self.over else []
        return beside + [table for section in self.shown for table in section.tables]

    def render(self, template: str, **more: object) -> str:
        """One of the templates of this package, as Markdown."""
        claimed = verdict_table(self.verdicts).to_markdown(index=False) if self.verdicts else ""
        more = {"tally": tally(self.verdicts), "main_result": self.main_result, "over": self.over} | more
        bounds = {(str(b["date"]), b["value"], b["reason"]): b["after"] for v in self.verdicts for b in v.bounds}
        return self.environment.get_template(template).render(
            verdicts=self.verdicts, verdict_table=claimed,
            bounds=[(*about, after) for about, after in bounds.items()], **more,
        )  # fmt: skip

    def about(self) -> dict[str, object]:
        """What every form of the whole document is made of."""
        metrics = [run.metrics for section in self.sections for run in section.runs]
        return {
            "title": TITLE, "over": self.over, "tally": tally(self.verdicts), "main_result": self.main_result,
            "card": published.card()["source"], "sections": self.shown,
            "hashes": hashes(self.sections), "setup": setup(self.sections), "timed": timed(self.sections),
            "beside_recency": self.beside_recency,
            "flagged": max(found.get("ppl/flagged", 0.0) for found in metrics), **asdict(self.origin),
            "references": published.references({run.method for s in self.sections for run in s.runs}),
            "no_verdicts": "The section `paper` decides on the claims; it is not here, or has too few documents.",
        }  # fmt: skip

    def without_figures(self) -> str:
        """`paper.md` where no pictures lie beside it."""
        return replace(self, shown=[replace(section, figures=[]) for section in self.shown]).text()

    def text(self) -> str:
        """`paper.md`."""
        lines = pd.DataFrame(traced(self.sections)).to_markdown(index=False, disable_numparse=True)
        return self.render("paper.md.j2", trace=lines, **self.about())

    def tex(self) -> str:
        """`paper.tex`."""
        environment = Environment(
            loader=PackageLoader("pipeline.paper", "."), undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, block_start_string="((*", block_end_string="*))", variable_start_string="(((",
            variable_end_string=")))", comment_start_string="((#", comment_end_string="#))",
        )  # fmt: skip
        environment.filters |= {"tex": latex_text, "markdown": latex}
        about = self.about()
        texts = {name: self.render(f"{name}.md.j2", **about) for name in ("reading", "deciding", "limits")}
        return environment.get_template("paper.tex.j2").render(verdicts=self.verdicts, shown=_tabular, **texts, **about)

    def excerpt(self) -> str:
        """What another document shows: the main result, the verdicts, and a figure."""
        return self._copied("readme.md.j2", [])

    def published_tables(self) -> str:
        """The published tables beside ours, as a document of its own."""
        everything = [table for section in self.shown for table in section.tables]
        tables = [table for table in everything if table.name.startswith("published_")]
        return self._copied("published_tables.md.j2", tables)

    def models(self) -> str:
        """The section over models as a document of its own, with settings, machine and hashes of every run."""
        of = {m.title: [run for section in m.sections for run in section.runs] for m in self.over.models}
        hashes = [
            (f"{tag}, {title}", ", ".join(dict.fromkeys(run.tags.get(tag, "-") for run in runs)))
            for tag in ("git.revision", "hash.model", "hash.document")
            for title, runs in of.items()
        ]
        sections = [section for model in self.over.models for section in model.sections]
        counts = {title: len({run.run_id for run in runs}) for title, runs in of.items()}
        return self.render(
            "models_alone.md.j2", setup=setup(sections), timed=timed(sections), runs=counts, hashes=hashes,
            card=published.card()["source"], **asdict(self.origin),
        )  # fmt: skip

    def _copied(self, template: str, tables: list[Table]) -> str:
        runs = len({run.run_id for section in self.sections for run in section.runs})
        captions = {figure.name: figure.caption for section in self.shown for figure in section.figures}
        about = {"captions": captions, "runs": runs, "timed": timed(self.sections)}
        return self.render(template, tables=tables, **about, **asdict(self.origin))


def _tabular(table: Table) -> str:
    """A table of `paper.tex`, where it stands and no wider than the page."""
    body = f"\\begin{{fit}}\n{table.tabular()}\\end{{fit}}"
    return f"\\textbf{{{latex_text(table.title)}}}\n\n{body}\n\n{{\\small {latex(table.note)}}}\n"


def write_results(document: Document, stem: Path) -> None:
    """Write the section over models, or the document without figures, to `<stem>.md`, and every run to `<stem>.csv`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = document.models() if document.over else document.without_figures()
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    origin = document.origin
    alone = [ModelResults(origin.model, origin.documents, document.sections, document.verdicts)]
    runs = runs_table(document.over.models if document.over else alone)
    runs.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.6g")


def _results(document: Document) -> dict:
    over = {m.title: [v.as_dict() for v in m.verdicts] for m in document.over.models} if document.over else None
    return {
        **asdict(document.origin),
        **({"models": over} if over else {}),
        "published": published.card(),
        "main_result": document.main_result,
        "claims": [verdict.as_dict() for verdict in document.verdicts],
        "tables": {t.name: t.numbers.to_dict(orient="records") for t in document.tables},
        "sections": {
            section.experiment: [
                {
                    "run": run.run_id,
                    "choice": run.choice,
                    "documents": run.count,
                    **{tag.replace(".", "_"): run.tags.get(tag) for tag in ("identity", *TRACED)},
                    "metrics": dict(sorted(run.metrics.items())),
                }
                for run in section.runs
            ]
            for section in document.sections
        },
    }


def write(
    sections: list[MeasuredSection], origin: Origin, folder: Path, over: OverModels | None = None
) -> Document:  # fmt: skip
    """Write `paper.md`, `paper.tex`, `index.html`, `results.json`, `tables/` and `figures/`.

    Parameters
    ----------
    folder : Path
        Its `tables` are made anew, and its `figures` where they would be others.
    over : OverModels, optional
        A section over several models, of which `sections` are the first one's.
    """
    for sub in ("tables", "figures"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for old in (folder / "tables").iterdir():
        old.unlink()
    drawn = draw(sections, folder / "figures", folder / "drawn.json")
    shown = [
        Shown(
            section.experiment, section.title, len(section.runs), section.counts, portable(section.command),
            section.narrowed, section.withheld,
            [] if section.withheld else TABLES[section.experiment](section), drawn.get(section.experiment, []),
        )
        for section in sections
    ]  # fmt: skip
    runs = recency.pruned(sections)
    found = recency.comparisons(runs)
    document = Document(
        origin, sections, shown, judged(sections), recency.table(found) if found else None,
        [recency.summary(found), *recency.sentences(found, runs)] if found else [], over,
    )  # fmt: skip
    for table in document.tables:
        table.numbers.to_csv(folder / "tables" / f"{table.name}.csv", index=False)
        (folder / "tables" / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
    (folder / "paper.md").write_text(document.text(), encoding="utf-8")
    (folder / "paper.tex").write_text(document.tex(), encoding="utf-8")
    (folder / "index.html").write_text(page(document, folder / "figures"), encoding="utf-8")
    results = _clean(_results(document))
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    return document
