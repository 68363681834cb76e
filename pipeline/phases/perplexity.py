"""Perplexity of the true continuation on a compressed cache."""

from dataclasses import dataclass

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.metrics.prediction import kl_divergence, negative_log_likelihood, top1_agreement
from spectral_kv.xp import like, to_numpy

DETERMINISTIC = 1.5  # full-cache perplexity under which a document measures copying


@dataclass(frozen=True)
class Perplexity:
    """The cache is compressed once, then `tokens` continuation tokens are fed.

    Scored are the tokens after the first: the first is predicted by the full cache. `ppl/nd` is the relative rise
    `(ppl - ppl_full) / ppl_full`; `ppl/flagged` is 1 for a document that the full cache predicts almost perfectly.
    """

    tokens: int = 256

    def __post_init__(self):
        if self.tokens < 2:
            raise ValueError(f"phase.perplexity.tokens={self.tokens} must be at least 2: the first is not scored")

    @property
    def needs(self) -> int:
        return self.tokens

    def measure(self, context: Context) -> list[Row]:
        continuation = context.full.continuation[: self.tokens]
        full = context.full.extended(self.tokens).logits[:-1]
        compressed = context.backend.extend(context.compressed.cache.copy(), continuation).logits[:-1]
        targets = like(continuation[1:], full)
        nll_full = float(negative_log_likelihood(full, targets).mean())
        nll = float(negative_log_likelihood(compressed, targets).mean())
        values = {
            "ppl/full": np.exp(nll_full),
            "ppl/comp": np.exp(nll),
            "ppl/nd": np.exp(nll - nll_full) - 1.0,
            "ppl/delta_nll": nll - nll_full,
            "ppl/kl": to_numpy(kl_divergence(full, compressed)).mean(),
            "ppl/top1": to_numpy(top1_agreement(full, compressed)).mean(),
            "ppl/flagged": np.exp(nll_full) < DETERMINISTIC,
        }
        return [{"metric": name, "value": float(value)} for name, value in values.items()]
