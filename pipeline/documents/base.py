"""Documents: token windows of a prompt and its true continuation."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from pipeline.documents.chat import Chat
from pipeline.settings.errors import InputError


class TooFewWindows(InputError):
    """A source holds fewer windows, `held`, than it is asked for."""

    def __init__(self, message: str, held: int):
        super().__init__(message)
        self.held = held


@dataclass(frozen=True)
class Asked:
    """A question whose answer stands in a prompt.

    Parameters
    ----------
    question : np.ndarray of int, [tokens]
        What is fed after the prompt before the answer is expected; at least one token.
    answer : np.ndarray of int, [tokens]
    depth : float
        Where in the prompt's text the answer begins: 0 at its start, 1 at its end.
    places : np.ndarray of int, [tokens], optional
        Positions in the prompt of the sentences that hold the answer.
    """

    question: np.ndarray
    answer: np.ndarray
    depth: float
    places: np.ndarray | None = None


@lru_cache(maxsize=4)  # the jobs of a sweep cut the same texts
def tokenized(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[np.ndarray]:
    """Token ids `[tokens]` of every text, without special tokens."""
    return [np.array(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class Documents(ABC):
    """Base of the document sources.

    Parameters
    ----------
    tokens : int
        Prompt length T.
    continuation : int
        Tokens after the prompt.
    count : int
        Number of windows, spread evenly over all windows there are.
    """

    tokens: int = 4096
    continuation: int = 640
    count: int = 8

    source: ClassVar[str]  # how messages call it

    @abstractmethod
    def texts(self) -> list[str]:
        """The texts to cut; no window crosses from one to the next."""
        ...

    def made_of(self) -> frozenset[str]:
        """Names of the texts that the windows come from: what is measured on one of them is not evaluated on it."""
        return frozenset({self.source})

    def check(self) -> None:
        """Refuse sizes that can't be, and whatever a source can tell without reading all of its text."""
        for name, least in (("tokens", 16), ("continuation", 2), ("count", 1)):
            if getattr(self, name) < least:
                raise InputError(f"document.{name}={getattr(self, name)} is too small: give at least {least}")

    def windows(self, tokenizer: Tokenizer | None, bos: int | None, chat: Chat | None = None) -> list[np.ndarray]:
        """`count` arrays of `tokens + continuation` token ids.

        Parameters
        ----------
        bos : int, optional
            Token that begins every window; it counts as one of the prompt's tokens.
        chat : Chat, optional
            How the model is asked, for sources that ask.

        Raises
        ------
        InputError
            If nothing turns text into tokens; `TooFewWindows` if the source does not hold that many windows.
        """
        if tokenizer is None:
            raise InputError(f"the model has no tokenizer and can't read {self.source}: choose document=synthetic")
        length = self.tokens + self.continuation - (bos is not None)
        windows, total = [], 0
        for ids in tokenized(tokenizer, tuple(self.texts())):
            total += len(ids)
            windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        if len(windows) < self.count:
            raise TooFewWindows(
                f"document.count={self.count} windows of document.tokens={self.tokens} "
                f"plus document.continuation={self.continuation} tokens are more "
                f"than {self.source} holds ({total} tokens, {len(windows)} windows): "
                "ask for fewer or shorter windows, or give more text",
                len(windows),
            )
        chosen = [windows[i * len(windows) // self.count] for i in range(self.count)]
        return chosen if bos is None else [np.concatenate([[bos], w]) for w in chosen]

    def lookups(self, tokenizer: Tokenizer, bos: int | None, chat: Chat | None = None) -> list[list[Asked]]:
        """What can be asked about each of the `windows`: nothing, unless a source plants answers."""
        return [[] for _ in range(self.count)]


def content_hash(windows: list[np.ndarray]) -> str:
    """Hash of the token windows: the same tokens give the same hash wherever the text came from."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray(window, dtype="<i8").tobytes())
    return digest.hexdigest()[:16]
