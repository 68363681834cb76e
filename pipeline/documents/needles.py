"""Text with planted facts, distracting needles or variable chains, and the questions that they answer."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from pipeline.documents.base import Asked, Documents
from pipeline.documents.book import TITLES, book_text
from pipeline.documents.chat import Chat
from pipeline.documents.lookups import (
    ATTRIBUTES,
    Lookup,
    chains,
    distractors,
    facts,
    needles,
    several_questions,
    several_values,
    spliced,
)
from pipeline.documents.pydoc import Pydoc, topics_text
from pipeline.settings.errors import InputError

TASKS = {  # how lookups are drawn
    "single": facts, "multikey": needles, "chain": chains, "distractor": distractors, "multivalue": several_values,
    "multiquery": several_questions,
}  # fmt: skip
FORMS = ("auto", "plain", "chat")


def encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids `[tokens]`; special tokens in the text are read as such, and none is added."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def question_text(item: Lookup, chat: Chat | None) -> str:
    """What is fed between a document and the answer."""
    return f"\n{item.question}" if chat is None else f"{chat.around(item.asked)[1]}{item.lead}"


def line_ends(tokenizer: Tokenizer, text: np.ndarray) -> np.ndarray:
    """Places in token ids `[tokens]` at which a line begins or ends, the first token's included, ascending."""
    words = {token: tokenizer.decode([token]) for token in np.unique(text).tolist()}
    before = np.isin(text, [token for token, word in words.items() if word.startswith("\n")])
    after = np.isin(text, [token for token, word in words.items() if word.endswith("\n")])
    return np.flatnonzero(before | np.concatenate([[True], after[:-1]]))


def stratified(rng: np.random.Generator, count: int, questions: int) -> np.ndarray:
    """Depths `[count, questions]` in [0, 1): each row has one in every `questions`-th part, and all of them together
    have one in every `count * questions`-th part.
    """
    within = rng.permuted(np.tile(np.arange(count), (questions, 1)), axis=1).T + rng.random((count, questions))
    return (np.arange(questions) + within / count) / questions


@dataclass(frozen=True)
class Needles(Documents):
    """Windows of a text with sentences planted between its lines.

    In plain form they are asked for as in the reference model's training text; in chat form the text and the question
    are one turn of a user, and what comes before the answer begins the model's own.

    Parameters
    ----------
    task : str
        `single`: facts about different attributes. `multikey`: facts about one attribute, each a distractor for the
        others. `chain`: a value handed on over two hops; all variables that hold it are asked for. `distractor`: facts
        about one attribute, and for each three more whose names differ in one word. `multivalue`: two values of one
        name, both asked for. `multiquery`: two facts, asked for at once.
    planted : int
        Facts or chains in a prompt; those that are not asked for distract.
    questions : int
        How many of them are asked for, each on its own. Their depths (of a chain: its first sentence's) cover the
        prompt evenly, in every document and over all of them.
    visible : bool
        Whether the question ends the prompt, so that compression sees it. Its last token is held back: fed after the
        prompt, it makes the compressed cache predict the first token of the answer, too.
    seed : int
        Of names, values and depths.
    text : str
        Where sentences are planted: `pydoc`, the language reference, or a book of `pipeline.documents.book`.
    form : str
        `plain`, `chat`, or `auto` for chat where the model's tokenizer has a template.
    """

    task: str = "single"
    planted: int = 4
    questions: int = 4
    visible: bool = False
    seed: int = 0
    text: str = "pydoc"
    form: str = "auto"

    source: ClassVar[str] = "the text with planted lookups"

    def check(self) -> None:
        super().check()
        for name, known in (("task", TASKS), ("text", ("pydoc", *TITLES)), ("form", FORMS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"document.{name}={getattr(self, name)} is not known: choose one of {', '.join(known)}"
                )
        if self.task in ("single", "multivalue") and self.planted > len(ATTRIBUTES):
            raise InputError(
                f"document.planted={self.planted} is more than the {len(ATTRIBUTES)} attributes that facts can be "
                "about: plant fewer, or choose document.task=multikey"
            )
        if not 1 <= self.questions <= self.planted:
            raise InputError(
                f"document.questions={self.questions} must lie between 1 and document.planted={self.planted}"
            )
        if self.visible and self.questions > 1:
            raise InputError(
                f"document.visible=true puts the question into the prompt, which has room for one: "
                f"set document.questions=1 instead of {self.questions}"
            )

    def texts(self) -> list[str]:
        return [topics_text() if self.text == "pydoc" else book_text(self.text)]

    def made_of(self) -> frozenset[str]:
        return frozenset({Pydoc.source if self.text == "pydoc" else self.text})

    def windows(self, tokenizer: Tokenizer, bos: int | None, chat: Chat | None = None) -> list[np.ndarray]:
        return [window for window, _ in planted(self, tokenizer, bos, self._asked_in(chat))]

    def lookups(self, tokenizer: Tokenizer, bos: int | None, chat: Chat | None = None) -> list[list[Asked]]:
        return [asked for _, asked in planted(self, tokenizer, bos, self._asked_in(chat))]

    def _asked_in(self, chat: Chat | None) -> Chat | None:
        """The form in which questions are asked; None is plain."""
        if self.form == "chat" and chat is None:
            raise InputError(
                "document.form=chat needs a chat template, which the model's tokenizer has not: set document.form=plain"
            )
        return None if self.form == "plain" else chat

    def _planted(
        self, tokenizer: Tokenizer, bos: int | None, chat: Chat | None
    ) -> list[tuple[np.ndarray, list[Asked]]]:
        rng = np.random.default_rng(self.seed)
        depths = stratified(rng, self.count, self.questions)
        windows = super().windows(tokenizer, bos)
        opening = np.array([] if bos is None else [bos], dtype=np.int64)
        if chat is not None:
            opening = encoded(tokenizer, chat.around("")[0])
            if bos is not None and opening[:1].tolist() != [bos]:
                opening = np.concatenate([[bos], opening])
        texts = [window if bos is None else window[1:] for window in windows]
        return [self._plant(rng, tokenizer, opening, t, d, chat) for t, d in zip(texts, depths, strict=True)]

    def _plant(
        self,
        rng: np.random.Generator,
        tokenizer: Tokenizer,
        opening: np.ndarray,
        text: np.ndarray,
        depths: np.ndarray,
        chat: Chat | None,
    ) -> tuple[np.ndarray, list[Asked]]:
        """The window with sentences planted in the text behind its opening, and what is asked about it.

        `depths` `[questions]` are those of the first sentences that belong to a question.
        """

        drawn = TASKS[self.task](rng, self.planted)
        sentences, wanted, first = [], [], []
        for item, depth in zip(drawn, [*depths, *rng.random(len(drawn) - self.questions)], strict=True):
            first.append(len(sentences))
            sentences += [encoded(tokenizer, f"\n{s}\n") for s in item.statements]
            wanted += [depth, *np.sort(rng.uniform(depth, 1, len(item.statements) - 1))]
        pairs = [
            (encoded(tokenizer, question_text(item, chat)), encoded(tokenizer, f" {item.answer}."))
            for item in drawn[: self.questions]
        ]
        ending = pairs[0][0][:0]
        if self.visible:
            question, answer = pairs[0]
            ending, pairs = question[:-1], [(question[-1:], answer)]
        taken = len(opening) + sum(map(len, sentences)) + len(ending)
        if 2 * taken > self.tokens:
            raise InputError(
                f"document.tokens={self.tokens} is too short for document.planted={self.planted}, which take {taken} "
                "tokens: leave at least as many for the text"
            )
        longest = max(len(question) + len(answer) for question, answer in pairs)
        if longest > self.continuation:
            raise InputError(
                f"document.continuation={self.continuation} is too short: question and answer are fed in its place "
                f"and have {longest} tokens"
            )
        text, rest = np.split(text, [self.tokens - taken])
        ends = line_ends(tokenizer, text)
        places = ends[np.searchsorted(ends, np.array(wanted) * len(text), side="right") - 1]
        order = np.argsort(places, kind="stable")
        spans = np.empty((len(sentences), 2), dtype=np.int64)
        lengths = np.array([len(sentences[i]) for i in order])
        spans[order, 0] = len(opening) + places[order] + np.cumsum(lengths) - lengths
        spans[order, 1] = spans[order, 0] + lengths
        whole = spliced(text, [sentences[i] for i in order], places[order])
        asked = [
            Asked(
                question,
                answer,
                float(places[i] / len(text)),
                np.concatenate([np.arange(*span) for span in spans[i : i + len(item.statements)]]),
            )
            for (question, answer), i, item in zip(pairs, first[: self.questions], drawn, strict=False)
        ]
        return np.concatenate([opening, whole, ending, rest[: self.continuation]]), asked


@lru_cache(maxsize=4)  # windows and lookups are asked for one after the other, by every job of a sweep
def planted(
    documents: Needles, tokenizer: Tokenizer, bos: int | None, chat: Chat | None
) -> list[tuple[np.ndarray, list[Asked]]]:
    """Every window with its planted sentences, and what is asked about it."""
    return documents._planted(tokenizer, bos, chat)
