"""The document: tables, figures, claims and their origin, written to a folder."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.paper import published
from pipeline.paper.claims import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, claims, decide
from pipeline.paper.measured import Measured
from pipeline.paper.tables import TABLES, Table, by_method

TITLE = "SpectralKV, measured again"
TRACED = ("git.revision", "git.changed", "hash.model", "hash.document", "hash.code")


@dataclass(frozen=True)
class Drawn:
    """A figure in the document."""

    name: str
    caption: str


@dataclass(frozen=True)
class Shown:
    """A section as the template prints it."""

    experiment: str
    title: str
    runs: int
    count: int
    withheld: str | None
    tables: list[Table]
    figures: list[Drawn]


@dataclass(frozen=True)
class Origin:
    """What the whole document is about, and how it was made."""

    model: str
    documents: str
    store: str
    command: str


def judged(sections: list[Measured]) -> list[Verdict]:
    """The verdict on every claim, or none if the runs that decide them are not there."""
    decisive = next((s for s in sections if s.experiment == "paper" and not s.withheld), None)
    return [] if decisive is None else [decide(claim, by_method(decisive.runs)) for claim in claims()]


def tally(verdicts: list[Verdict]) -> str:
    """How many claims came out which way, in words."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    parts = [f"{counts[name]} {name}" for name in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)]
    return f"Of {len(verdicts)} published claims: {', '.join(parts)}."


def verdict_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One line a claim, as printed."""
    lines = [
        {"from": v.source, "claim": v.statement, "verdict": f"**{v.verdict}**", "decided by": v.deciding}
        for v in verdicts
    ]
    return pd.DataFrame(lines)


def _traced(sections: list[Measured]) -> tuple[str, list[tuple[str, str]]]:
    """One line a run, and every hash that they share."""
    lines: dict[str, dict[str, str]] = {}
    for section in sections:
        for run in section.runs:
            choice = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in run.choice.items())
            line = lines.setdefault(
                run.run_id,
                {
                    "what": f"{section.experiment}: {choice}",
                    "run": run.run_id,
                    "identity": run.tags["identity"],
                    "documents": run.tags["hash.document"],
                },
            )
            if not line["what"].startswith(f"{section.experiment}:"):
                line["what"] += f"; {section.experiment}: {choice}"
    everything = [run for section in sections for run in section.runs]
    hashes = []
    for tag in TRACED:
        for value in dict.fromkeys(run.tags.get(tag, "-") for run in everything):
            of = [s.experiment for s in sections if any(run.tags.get(tag, "-") == value for run in s.runs)]
            hashes.append((f"{tag} of {', '.join(of)}", value))
    return pd.DataFrame(lines.values()).to_markdown(index=False, disable_numparse=True), hashes


def _clean(value: object) -> object:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def draw(sections: list[Measured], folder: Path) -> dict[str, list[Drawn]]:
    """Draw the figures of the sections that are not withheld, as PNG and SVG; what stands in which section."""
    import matplotlib.pyplot as plt

    from pipeline.paper.figures import FIGURES, STYLE

    there = {section.experiment: section for section in sections if not section.withheld}
    drawn: dict[str, list[Drawn]] = {}
    with plt.style.context(STYLE):
        for name, (function, experiment, caption) in FIGURES.items():
            if (figure := function(there)) is not None:
                figure.savefig(folder / f"{name}.png", metadata={"Software": None})
                figure.set_layout_engine("none")  # the layout stays; it need not be found again
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)
                drawn.setdefault(experiment, []).append(Drawn(name, caption))
    return drawn


@dataclass(frozen=True)
class Document:
    """The document, ready to be written."""

    origin: Origin
    sections: list[Measured]
    shown: list[Shown]
    verdicts: list[Verdict]

    def render(self, template: str, **more: object) -> str:
        """One of the templates of this package."""
        environment = Environment(
            loader=PackageLoader("pipeline.paper", "."), undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        claimed = verdict_table(self.verdicts).to_markdown(index=False) if self.verdicts else ""
        return environment.get_template(template).render(
            verdicts=self.verdicts, verdict_table=claimed, tally=tally(self.verdicts), **more
        )

    def text(self) -> str:
        """`paper.md`."""
        trace, hashes = _traced(self.sections)
        metrics = [run.metrics for section in self.sections for run in section.runs]
        return self.render(
            "paper.md.j2", title=TITLE, card=published.card()["source"], sections=self.shown, trace=trace,
            hashes=hashes, flagged=max(found.get("ppl/flagged", 0.0) for found in metrics), **asdict(self.origin),
            no_verdicts="The section `paper` decides on the claims; it is not here, or has too few documents.",
        )  # fmt: skip

    def excerpt(self) -> str:
        """What another document shows: verdicts, the published tables, and two figures."""
        tables = [table for section in self.shown for table in section.tables if table.name.startswith("published_")]
        captions = {figure.name: figure.caption for section in self.shown for figure in section.figures}
        return self.render("readme.md.j2", tables=tables, captions=captions)


def _results(document: Document) -> dict:
    return {
        **asdict(document.origin),
        "published": published.card(),
        "claims": [verdict.as_dict() for verdict in document.verdicts],
        "tables": {t.name: t.numbers.to_dict(orient="records") for section in document.shown for t in section.tables},
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


def write(sections: list[Measured], origin: Origin, folder: Path) -> Document:
    """Write `paper.md`, `results.json`, `tables/` and `figures/`.

    Parameters
    ----------
    folder : Path
        Its `tables` and `figures` are made anew.
    """
    for sub in ("tables", "figures"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        for old in (folder / sub).iterdir():
            old.unlink()
    drawn = draw(sections, folder / "figures")
    shown = [
        Shown(
            section.experiment, section.title, len(section.runs), section.counts, section.withheld,
            [] if section.withheld else TABLES[section.experiment](section), drawn.get(section.experiment, []),
        )
        for section in sections
    ]  # fmt: skip
    for section in shown:
        for table in section.tables:
            table.numbers.to_csv(folder / "tables" / f"{table.name}.csv", index=False)
            (folder / "tables" / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
    document = Document(origin, sections, shown, judged(sections))
    (folder / "paper.md").write_text(document.text(), encoding="utf-8")
    results = _clean(_results(document))
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    return document
