"""Text of many kinds, to calibrate on: nothing is evaluated on it."""

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import ClassVar

from pipeline.documents.base import Documents
from pipeline.documents.book import CALIBRATION, EVALUATION, book_text
from pipeline.documents.docstrings import LEFT_OUT, Docstrings, docstrings_text
from pipeline.documents.overlap import shingles
from pipeline.documents.pydoc import topics_text

LIMIT = 600_000  # characters of a kind, so that none dominates
FILE_LIMIT = 40_000  # characters of a file


@cache
def _evaluation() -> frozenset[tuple[str, ...]]:
    return frozenset(shingles("\n\n".join([topics_text(), *map(book_text, EVALUATION)])))


def shared_with_evaluation(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Runs of ten words that texts share with the language reference or a book that is evaluated on."""
    return {run for text in texts for run in _evaluation() & shingles(text)}


def _limited(texts: Iterable[str]) -> str:
    """The beginnings of texts, up to `LIMIT`, without paragraphs that share ten words in a row with evaluation text."""
    evaluation = _evaluation()
    joined, size = [], 0
    for text in texts:
        paragraphs = text[:FILE_LIMIT].split("\n\n")
        joined.append("\n\n".join(p for p in paragraphs if evaluation.isdisjoint(shingles(p))))
        size += len(joined[-1])
        if size > LIMIT:
            break
    return "\n\n".join(joined)[:LIMIT]


def _sources():
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py"))[::7]:
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            try:
                yield file.read_text(encoding="utf-8")
            except ValueError:
                continue


def _descriptions():
    """What installed packages say about themselves."""
    for found in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        if text := found.read_text("METADATA"):
            yield text


def _licences():
    seen = set()
    for found in sorted(distributions(), key=lambda d: d.metadata["Name"].lower()):
        for file in found.files or []:
            if "LICENSE" in file.name.upper() and (path := Path(found.locate_file(file))).is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                if text[:2000] not in seen:
                    seen.add(text[:2000])
                    yield text


@dataclass(frozen=True)
class Mixed(Documents):
    """Windows of docstrings, source code, packages' descriptions, licences and a novel.

    All but the novel are those of the Python that runs this, so the text differs between machines; its hash tells.
    """

    source: ClassVar[str] = "mixed text"

    def texts(self) -> list[str]:
        return [
            docstrings_text()[:LIMIT], _limited(_sources()), _limited(_descriptions()), _limited(_licences()),
            *(book_text(title)[:LIMIT] for title in CALIBRATION),
        ]  # fmt: skip

    def made_of(self) -> frozenset[str]:
        return frozenset({self.source, Docstrings.source, *CALIBRATION})
