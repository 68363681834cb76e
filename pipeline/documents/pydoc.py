"""Python's own language reference, present in every CPython."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.documents.base import Documents


def topics_text() -> str:
    """The language reference as one text, in the order in which CPython stores its topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


@dataclass(frozen=True)
class Pydoc(Documents):
    """Windows of the language reference. Its text differs a little between Python versions; the document hash tells."""

    source: ClassVar[str] = "Python's language reference"

    def texts(self) -> list[str]:
        return [topics_text()]
