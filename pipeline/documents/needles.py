"""Text with planted facts, distracting needles or variable chains, and the questions that they answer."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from pipeline.documents.base import Asked, Documents
from pipeline.documents.lookups import ATTRIBUTES, chains, facts, needles, spliced
from pipeline.documents.pydoc import topics_text
from pipeline.settings.errors import InputError

TASKS = ("single", "multikey", "chain")


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
    """Windows of the language reference with sentences planted between its lines, in the form of the reference
    model's training text.

    Parameters
    ----------
    task : str
        `single`: facts about different attributes. `multikey`: facts about one attribute, each a distractor for the
        others. `chain`: a value handed on over two hops; all variables that hold it are asked for.
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
    """

    task: str = "single"
    planted: int = 4
    questions: int = 4
    visible: bool = False
    seed: int = 0

    source: ClassVar[str] = "Python's language reference with planted lookups"

    def check(self) -> None:
        super().check()
        if self.task not in TASKS:
            raise InputError(f"document.task={self.task} is not known: choose one of {', '.join(TASKS)}")
        if self.task == "single" and self.planted > len(ATTRIBUTES):
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
        return [topics_text()]

    def windows(self, tokenizer: Tokenizer, bos: int | None) -> list[np.ndarray]:
        return [window for window, _ in planted(self, tokenizer, bos)]

    def lookups(self, tokenizer: Tokenizer, bos: int | None) -> list[list[Asked]]:
        return [asked for _, asked in planted(self, tokenizer, bos)]

    def _planted(self, tokenizer: Tokenizer, bos: int | None) -> list[tuple[np.ndarray, list[Asked]]]:
        rng = np.random.default_rng(self.seed)
        depths = stratified(rng, self.count, self.questions)
        windows = super().windows(tokenizer, bos)
        start = 0 if bos is None else 1
        return [self._plant(rng, tokenizer, w, start, d) for w, d in zip(windows, depths, strict=True)]

    def _plant(
        self, rng: np.random.Generator, tokenizer: Tokenizer, window: np.ndarray, start: int, depths: np.ndarray
    ) -> tuple[np.ndarray, list[Asked]]:
        """The window with sentences planted after its first `start` tokens, and what is asked about it.

        `depths` `[questions]` are those of the first sentences that belong to a question.
        """

        def encoded(text: str) -> np.ndarray:
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

        drawn = {"single": facts, "multikey": needles, "chain": chains}[self.task](rng, self.planted)
        sentences, wanted, first = [], [], []
        for item, depth in zip(drawn, [*depths, *rng.random(self.planted - self.questions)], strict=True):
            first.append(len(sentences))
            sentences += [encoded(f"\n{s}\n") for s in item.statements]
            wanted += [depth, *np.sort(rng.uniform(depth, 1, len(item.statements) - 1))]
        pairs = [(encoded(f"\n{item.question}"), encoded(f" {item.answer}.")) for item in drawn[: self.questions]]
        ending = pairs[0][0][:0]
        if self.visible:
            question, answer = pairs[0]
            ending, pairs = question[:-1], [(question[-1:], answer)]
        taken = start + sum(map(len, sentences)) + len(ending)
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
        text, rest = np.split(window[start:], [self.tokens - taken])
        ends = line_ends(tokenizer, text)
        places = ends[np.searchsorted(ends, np.array(wanted) * len(text), side="right") - 1]
        order = np.argsort(places, kind="stable")
        planted = spliced(text, [sentences[i] for i in order], places[order])
        asked = [
            Asked(question, answer, float(places[i] / len(text)))
            for (question, answer), i in zip(pairs, first[: self.questions], strict=True)
        ]
        return np.concatenate([window[:start], planted, ending, rest[: self.continuation]]), asked


@lru_cache(maxsize=4)  # windows and lookups are asked for one after the other, by every job of a sweep
def planted(documents: Needles, tokenizer: Tokenizer, bos: int | None) -> list[tuple[np.ndarray, list[Asked]]]:
    """Every window with its planted sentences, and what is asked about it."""
    return documents._planted(tokenizer, bos)
