"""Retrieval: whether a compressed cache answers questions about its prompt."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.documents.base import Asked
from pipeline.phases.base import Context, Row
from spectral_kv.attention import attention_mass, attention_weights
from spectral_kv.xp import to_numpy

LEAST_FULL_RECALL = 0.6  # below it the task tells more about the model than about the cache


@dataclass(frozen=True)
class Retrieval:
    """Share of the documents' lookups that are answered, each on a copy of the compressed cache.

    Answers are decoded greedily and count if every token is right. The full cache answers the same questions;
    `retrieval/answerable` is the recall among those that it gets right, and is left out where there are none.
    `retrieval/kept` is the share of the sentences that hold an answer which is kept, over layers and KV heads: what a
    budget keeps of the average token is budget / prompt; `retrieval/gone_everywhere` is the share that none of them
    keeps. Not all heads read a sentence: `retrieval/mass` is the share
    of the attention over the prompt that it gets on the full cache while the answer is predicted, and
    `retrieval/mass_kept` the share of that attention, summed over layers and KV heads, that is for kept tokens. Both
    and `retrieval/kept` also by layer and KV head.
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
        placed = [asked for asked in context.lookups if asked.places is not None]
        heads: list[Row] = []
        if placed:
            kept = np.stack([_kept(context, asked.places) for asked in placed])
            masses = [_read(context, asked) for asked in placed]
            mass = np.stack([of.sum(axis=-1) for of in masses])
            read = sum((of * _chosen(context, asked.places)).sum() for of, asked in zip(masses, placed, strict=True))
            values["retrieval/kept"], values["retrieval/mass"] = kept.mean(), mass.mean()
            values["retrieval/mass_kept"] = read / mass.sum()
            gone = [1 - _chosen(context, asked.places).any(axis=(0, 1)).mean() for asked in placed]
            values["retrieval/gone_everywhere"] = np.mean(gone)
            heads = [
                {"layer": layer, "head": head, "metric": metric, "value": float(found.mean(axis=0)[layer, head])}
                for metric, found in (("retrieval/kept", kept), ("retrieval/mass", mass))
                for layer, head in np.ndindex(found.shape[1:])
            ]
        rows: list[Row] = [
            {"depth": asked.depth, "metric": metric, "value": float(found)}
            for asked, both in zip(context.lookups, right, strict=True)
            for metric, found in zip(("retrieval/recall", "retrieval/full_recall"), both, strict=True)
        ]
        if theirs.any():
            values["retrieval/answerable"] = ours[theirs].mean()
        return rows + heads + [{"metric": name, "value": float(value)} for name, value in values.items()]


def _chosen(context: Context, places: np.ndarray) -> np.ndarray:
    """Which of the prompt's tokens at `places` `[tokens]` are kept: `[layers, kv_heads, tokens]`."""
    if context.kept is None:
        return np.ones((1, 1, len(places)), dtype=bool)
    return np.stack([[np.isin(places, to_numpy(head)) for head in layer] for layer in context.kept])


def _kept(context: Context, places: np.ndarray) -> np.ndarray:
    """Share of the tokens at `places` `[tokens]` that is kept: `[layers, kv_heads]`."""
    shape = (len(context.prefill.keys), len(context.prefill.keys[0]))
    return np.broadcast_to(_chosen(context, places).mean(axis=-1), shape)


def _read(context: Context, asked: Asked) -> np.ndarray:
    """Attention that the tokens at the answer's places get while the answer is predicted on the full cache.

    `[layers, kv_heads, tokens]`: weights over the prompt, means over the answer's tokens and the query heads of a KV
    head. The answer is fed as it should be.
    """

    def read() -> np.ndarray:
        fed = np.concatenate([asked.question, asked.answer[:-1]])
        queries = context.backend.extend(context.full_cache(), fed).queries
        found = []
        for layer, keys in zip(queries, context.prefill.keys, strict=True):
            weights = attention_weights(layer[:, -len(asked.answer) :], keys, context.backend.scaling)
            found.append(to_numpy(attention_mass(weights, len(keys)))[:, asked.places])
        return np.stack(found)

    return context.once(("read", asked.question.tobytes(), asked.answer.tobytes()), read)
