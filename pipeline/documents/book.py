"""Books out of copyright that the project carries: long natural English that is not about software."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.documents.base import Documents
from pipeline.documents.docstrings import Docstrings, docstrings_text
from pipeline.settings.errors import InputError

SHELF = Path(__file__).parent / "books"
EVALUATION = ("persuasion", "king_james")  # nothing is calibrated on them
CALIBRATION = ("northanger_abbey",)
TITLES = (*EVALUATION, *CALIBRATION)


def book_text(title: str) -> str:
    """One of the `TITLES` from its first word to its last."""
    return (SHELF / f"{title}.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Book(Documents):
    """Windows of a book.

    Parameters
    ----------
    title : str
        One of `TITLES`.
    """

    title: str = "persuasion"

    source: ClassVar[str] = "the book"

    def check(self) -> None:
        super().check()
        if self.title not in TITLES:
            raise InputError(f"document.title={self.title} is not known: choose one of {', '.join(TITLES)}")

    def texts(self) -> list[str]:
        return [book_text(self.title)]

    def made_of(self) -> frozenset[str]:
        return frozenset({self.title})


@dataclass(frozen=True)
class Calibration(Documents):
    """Windows of two kinds of text that nothing is evaluated on: docstrings, and a novel."""

    source: ClassVar[str] = "the calibration text"

    def texts(self) -> list[str]:
        return [docstrings_text(), *map(book_text, CALIBRATION)]

    def made_of(self) -> frozenset[str]:
        return frozenset({Docstrings.source, *CALIBRATION})
