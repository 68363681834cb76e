"""Python's own language reference, present in every CPython."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from pipeline.documents.base import Documents


@cache
def topics_text() -> str:
    """The language reference as one text, in the order in which CPython stores its topics.

    Topics contain one another: a paragraph of more than 40 characters that was there before is left out, so that no two
    windows hold the same text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for topic in topics.values():
        for paragraph in topic.split("\n\n"):
            if len(paragraph) > 40:
                if paragraph in seen:
                    continue
                seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


@dataclass(frozen=True)
class Pydoc(Documents):
    """Windows of the language reference. Its text differs a little between Python versions; the document hash tells."""

    source: ClassVar[str] = "Python's language reference"

    def texts(self) -> list[str]:
        return [topics_text()]
