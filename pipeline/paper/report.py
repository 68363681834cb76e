"""The document as one page to open: the parts of `paper.md`, where every number leads to the runs that it is from."""

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from pipeline.paper import published
from pipeline.paper.claims import claims, needs
from pipeline.paper.finished import FinishedRun
from pipeline.paper.hover import inline
from pipeline.paper.palette import look
from pipeline.paper.provenance import by_choice, traced
from pipeline.paper.table import MISSING, Table

if TYPE_CHECKING:  # which writes this page beside its other files
    from pipeline.paper.document import Document

INTERVAL = re.compile(r"^\[([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?), ")
NUMBER = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)( [^\[*]*)?( \[[^\]]*\])?( \*)?$")
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


@dataclass(frozen=True)
class Cell:
    """A printed cell taken apart: the number, what stands behind it, its interval, and whether it has a star."""

    number: str
    unit: str
    interval: str
    star: bool
    value: float | None  # by which it is sorted
    runs: list[str]


def cell(text: str, runs: list[str]) -> Cell:
    """A cell of a table."""
    if found := NUMBER.match(text):
        number, unit, interval, star = found.groups(default="")
        return Cell(number, unit, interval.strip(), bool(star), float(number), runs)
    if found := INTERVAL.match(text):  # sorted by where it begins
        return Cell(text, "", "", False, float(found[1]), runs)
    return Cell(text, "", "", False, None, runs if text != MISSING else [])


@dataclass(frozen=True)
class Column:
    """A column of a table; one of numbers has nothing but numbers and dashes."""

    label: str
    numeric: bool


@dataclass(frozen=True)
class Listed:
    """A table as the page prints it."""

    name: str
    title: str
    note: Markup
    columns: list[Column]
    lines: list[list[Cell]]


def prose(text: str) -> Markup:
    """Markdown as HTML."""
    return Markup(MARKDOWN.render(text))


def words(text: str) -> Markup:
    """A line of Markdown as HTML."""
    return Markup(MARKDOWN.renderInline(unbroken(text)))


def unbroken(text: str) -> str:
    """A text whose intervals stay on one line."""
    return re.sub(r"(\[[+-]?[\d.]+,) (?=[+-]?[\d.]+\])", "\\1\N{NO-BREAK SPACE}", text)


def listed(table: Table) -> Listed:
    """A table taken apart."""
    printed = table.cells.astype(str)
    lines = [
        [cell(line[column], table.runs(index, column)) for column in printed]
        for index, line in enumerate(printed.to_dict(orient="records"))
    ]
    numeric = [
        all(line[i].value is not None or line[i].number == MISSING for line in lines) for i in range(printed.shape[1])
    ]
    columns = [Column(label, own) for label, own in zip(printed, numeric, strict=True)]
    return Listed(table.name, table.title, words(table.note), columns, lines)


@dataclass(frozen=True)
class Traced:
    """A run as the page shows it: what it measured, how to open it, how to repeat it."""

    id: str
    title: str
    what: str
    facts: dict[str, str]
    rerun: str
    metrics: list[tuple[str, float, float | None, float | None]]


FACTS = {
    "identity": "identity", "documents": "hash.document", "model": "hash.model", "code": "hash.code",
    "revision": "git.revision", "hardware": "hardware",
}  # fmt: skip


def _traced_run(run: FinishedRun, what: str, where: str) -> Traced:
    facts = {name: run.tags[tag] for name, tag in FACTS.items() if tag in run.tags}
    if run.started:
        facts["measured"] = f"{datetime.fromtimestamp(run.started / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    found = run.metrics
    metrics = [
        (name, value, found.get(f"{name}_low"), found.get(f"{name}_high"))
        for name, value in sorted(found.items())
        if not name.endswith(("_low", "_high"))
    ]
    rerun = " ".join(["python -m pipeline.rerun", *([where] if where else []), run.run_id])
    return Traced(run.run_id, run.title, what, facts, rerun, metrics)


def _behind(document: "Document") -> dict[str, list[str]]:
    """Ids of the runs that a claim is decided by; an order is one of all methods that the published table has."""
    there = {s.experiment: by_choice(s) for s in document.sections}
    found = {}
    for claim in claims():
        named = {section: set(names) for section, names in needs(claim).items()}
        for test in claim["tests"]:
            if "table" in test:
                named[test.get("section", "paper")] |= set(published.table(test["table"]))
        found[claim["id"]] = [
            run.run_id
            for section, names in named.items()
            for name, run in there.get(section, {}).items()
            if name in names
        ]
    return found


def page(document: "Document", figures: Path) -> str:
    """`index.html`: text, tables, figures, style and behaviour in one file that asks no network for anything.

    Parameters
    ----------
    figures : Path
        Folder of the drawn figures.
    """
    environment = Environment(
        loader=PackageLoader("pipeline.paper", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=True,
    )  # fmt: skip
    environment.filters |= {
        "prose": prose,
        "words": words,
        "listed": listed,
        "shell": shlex.quote,
        "unbroken": unbroken,
    }
    there = files("pipeline.paper")
    runs = {run.run_id: run for section in document.measured for run in section.runs}
    lines = _lines(document)
    drawn = {
        figure.name: Markup(
            inline((figures / f"{figure.name}.svg").read_text(encoding="utf-8"), figure.name, figure.caption)
        )
        for section in document.shown
        for figure in section.figures
        if (figures / f"{figure.name}.svg").is_file()
    }
    about = document.about()
    return environment.get_template("report.html.j2").render(
        document=document, drawn=drawn, behind=_behind(document),
        runs=[_traced_run(runs[line["run"]], line["what"], about["where"]) for line in lines],
        titles={run.run_id: run.title for run in runs.values()},
        reading=prose(document.render("reading.md.j2", **about)),
        deciding=prose(document.render("deciding.md.j2", **about)),
        limits=prose(document.render("limits.md.j2", **about)),
        style=Markup(there.joinpath("report.css").read_text(encoding="utf-8")),
        behaviour=Markup(there.joinpath("report.js").read_text(encoding="utf-8")),
        colours=_colours(document),
        **about,
    )  # fmt: skip


def _lines(document: "Document") -> list[dict[str, str]]:
    """One line a run, of several models with the name of its own."""
    if document.over is None:
        return traced(document.sections)
    return [
        line | {"what": f"{model.title}, {line['what']}"}
        for model in document.over.models
        for line in traced(model.sections)
    ]


def _colours(document: "Document") -> dict[str, str]:
    """The colour of every method by its title, as in the figures."""
    return {run.title: look(run.method)["color"] for section in document.measured for run in section.runs}
