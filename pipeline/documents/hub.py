"""Data sets of the Hugging Face hub."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.documents.base import Documents
from pipeline.settings.errors import InputError


@dataclass(frozen=True)
class Hub(Documents):
    """Windows of a text column, all rows joined by blank lines.

    Parameters
    ----------
    id, subset, split, column : str
        As `datasets.load_dataset` calls them.
    revision : str, optional
        A commit of the data set, so that the text can't change.
    """

    id: str = "Salesforce/wikitext"
    subset: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None

    source: ClassVar[str] = "the data set"

    def texts(self) -> list[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError("document=hub needs the datasets library: pip install 'spectral-kv[hub]'") from None
        try:
            rows = load_dataset(self.id, self.subset, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises a dozen kinds; all mean that the data is not to be had
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"document.id={self.id} can't be loaded ({reason}): "
                "check the name and the network, or use document=file"
            ) from None
        if self.column not in rows.column_names:
            raise InputError(
                f"document.column={self.column} is not a column of {self.id}: "
                f"choose one of {', '.join(rows.column_names)}"
            )
        return ["\n\n".join(row for row in rows[self.column] if row.strip())]

    def made_of(self) -> frozenset[str]:
        return frozenset({f"{self.id} {self.subset} {self.split}"})
