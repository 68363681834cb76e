"""Retrieval: whether a compressed cache answers questions about its prompt."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.xp import to_numpy

LEAST_FULL_RECALL = 0.6  # below it the task tells more about the model than about the cache


@dataclass(frozen=True)
class Retrieval:
    """Share of the documents' lookups that are answered, each on a copy of the compressed cache.

    Answers are decoded greedily and count if every token is right. The full cache answers the same questions;
    `retrieval/answerable` is the recall among those that it gets right, and is left out where there are none.
    `retrieval/kept` is the share of the sentences that hold an answer which is kept, over layers and KV heads: what a
    budget keeps of the average token is budget / prompt.
    """

    asks: ClassVar[bool] = True
    predicts: ClassVar[bool] = True
    needs: ClassVar[int] = 1  # questions and answers are not taken from the continuation

    def measure(self, context: Context) -> list[Row]:
        right = []
        for asked in context.lookups:
            count = len(asked.answer)
            said = (
                context.answer(asked.question, count),
                context.full_answer(asked.question, count),
            )
            right.append([tokens == asked.answer.tolist() for tokens in said])
        ours, theirs = np.array(right).T
        values = {"retrieval/recall": ours.mean(), "retrieval/full_recall": theirs.mean()}
        places = [asked.places for asked in context.lookups if asked.places is not None]
        if places:
            values["retrieval/kept"] = np.mean([_kept(context, of) for of in places])
        rows: list[Row] = [
            {"depth": asked.depth, "metric": metric, "value": float(found)}
            for asked, both in zip(context.lookups, right, strict=True)
            for metric, found in zip(("retrieval/recall", "retrieval/full_recall"), both, strict=True)
        ]
        if theirs.any():
            values["retrieval/answerable"] = ours[theirs].mean()
        return rows + [{"metric": name, "value": float(value)} for name, value in values.items()]


def _kept(context: Context, places: np.ndarray) -> float:
    """Share of the prompt's tokens at `places` `[tokens]` that is kept, over layers and KV heads."""
    if context.kept is None:
        return 1.0
    return float(np.mean([np.isin(places, head) for layer in context.kept for head in to_numpy(layer)]))
