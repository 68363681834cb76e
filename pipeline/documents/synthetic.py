"""Random token ids: for models that make something up from them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tokenizers import Tokenizer

from pipeline.documents.base import Documents
from pipeline.documents.chat import Chat
from pipeline.settings.errors import InputError

VOCABULARY = 32_768  # ids are drawn below it where the model has no vocabulary


@dataclass(frozen=True)
class Synthetic(Documents):
    """Windows of independent, equally likely token ids.

    Parameters
    ----------
    seed : int
        Of the ids.
    """

    seed: int = 0

    source: ClassVar[str] = "random ids"

    def check(self) -> None:
        super().check()
        if self.seed < 0:
            raise InputError(f"document.seed={self.seed} can't be negative")

    def texts(self) -> list[str]:
        return []

    def windows(self, tokenizer: Tokenizer | None, bos: int | None, chat: Chat | None = None) -> list[np.ndarray]:
        vocabulary = VOCABULARY if tokenizer is None else tokenizer.get_vocab_size()
        ids = np.random.default_rng(self.seed).integers(vocabulary, size=(self.count, self.tokens + self.continuation))
        if bos is not None:
            ids[:, 0] = bos
        return list(ids)
