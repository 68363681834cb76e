"""A looped paragraph, like the document behind the published perplexities."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.documents.base import Documents

PARAGRAPH = (
    "A cache keeps what was computed once so that it need not be computed again. Every token that a model reads "
    "leaves a key and a value behind, and every later token looks at all of them. Long documents therefore fill the "
    "memory of the machine, and most of what fills it will hardly be looked at again. The question is which part that "
    "is, and who can tell in advance."
)


@dataclass(frozen=True)
class Repeated(Documents):
    """Windows of one paragraph said over and over. A model predicts it almost perfectly: the text measures copying."""

    count: int = 1
    paragraph: str | None = None

    source: ClassVar[str] = "the repeated paragraph"

    def texts(self) -> list[str]:
        paragraph = self.paragraph or PARAGRAPH
        # a word is at least one token, so this many repeats fill every window
        wanted = (self.tokens + self.continuation) * self.count
        words = max(1, len(paragraph.split()))
        return ["\n\n".join([paragraph] * (2 + wanted // words))]
