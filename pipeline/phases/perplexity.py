"""Perplexity of the true continuation on a compressed cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.metrics.prediction import kl_divergence, log_softmax, negative_log_likelihood, top1_agreement
from spectral_kv.xp import Array, like, to_numpy

DETERMINISTIC = 1.5  # full-cache perplexity under which a document measures copying


@dataclass(frozen=True)
class Perplexity:
    """The cache is compressed once, then `tokens` continuation tokens are fed.

    Scored are the tokens after the first: the first is predicted by the full cache. `ppl/nd` is the relative rise
    `(ppl - ppl_full) / ppl_full`; `ppl/flagged` is 1 for a document that the full cache predicts almost perfectly.

    Most tokens need only what is near. `ppl/delta_nll_context` is the rise over the context-dependent ones alone: those
    that a cache of `sinks` first and `recent` last tokens predicts worse than the full cache by more than `dependent`
    nats. A document without any has no such value.
    """

    tokens: int = 256
    sinks: int = 4
    recent: int = 64
    dependent: float = 0.5

    predicts: ClassVar[bool] = True

    def __post_init__(self):
        if self.tokens < 2:
            raise ValueError(f"phase.perplexity.tokens={self.tokens} must be at least 2: the first is not scored")
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                f"phase.perplexity.sinks={self.sinks} must be at least 0 and phase.perplexity.recent={self.recent} "
                "at least 1"
            )

    @property
    def needs(self) -> int:
        return self.tokens

    def measure(self, context: Context) -> list[Row]:
        continuation = context.continuation[: self.tokens]

        def loss(log_probabilities: Array) -> np.ndarray:
            targets = like(continuation[1:], log_probabilities)
            return to_numpy(negative_log_likelihood(log_probabilities, targets)).astype(float)

        def loss_near() -> np.ndarray:
            return loss(log_softmax(context.extended_near(self.tokens, self.sinks, self.recent).logits[:-1]))

        full = context.once(("prediction", self.tokens), lambda: log_softmax(context.extended(self.tokens).logits[:-1]))
        nll_near = context.once(("loss near", self.tokens, self.sinks, self.recent), loss_near)
        fed = context.backend.extend(context.compressed_cache(), continuation)
        compressed = log_softmax(fed.logits[:-1])
        nll_full, nll = loss(full), loss(compressed)
        rise = float(nll.mean()) - float(nll_full.mean())
        values = {
            "ppl/full": np.exp(nll_full.mean()),
            "ppl/comp": np.exp(nll.mean()),
            "ppl/nd": np.exp(rise) - 1.0,
            "ppl/delta_nll": rise,
            "ppl/kl": to_numpy(kl_divergence(full, compressed)).mean(),
            "ppl/top1": to_numpy(top1_agreement(full, compressed)).mean(),
            "ppl/flagged": np.exp(nll_full.mean()) < DETERMINISTIC,
        }
        dependent = nll_near - nll_full > self.dependent
        values["ppl/context_share"] = dependent.mean()
        if dependent.any():
            values["ppl/delta_nll_context"] = (nll - nll_full)[dependent].mean()
        return [{"metric": name, "value": float(value)} for name, value in values.items()]
