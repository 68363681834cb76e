"""Drift: how perturbation and loss change over turns, with the cache brought back to its budget after each."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from pipeline.stages.compress import foresees
from spectral_kv.attention import attention_output
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import negative_log_likelihood
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import like, to_numpy

POLICIES = ("recompress", "once")


@dataclass(frozen=True)
class Drift:
    """Turns of the true continuation, fed to the full and to the compressed cache alike.

    AOP is over everything before the turn; the loss is that of the turn's tokens after its first.

    Parameters
    ----------
    turns, tokens : int
        Number of turns, and tokens in each.
    policy : str
        `recompress` brings the cache back to its budget after every turn, `once` lets it grow.
    positions : int
        First tokens of every turn whose queries are compared.
    """

    turns: int = 5
    tokens: int = 128
    policy: str = "recompress"
    positions: int = 64

    predicts: ClassVar[bool] = True

    def __post_init__(self):
        if self.turns < 2 or self.tokens < 2:
            raise ValueError(
                f"phase.drift.turns={self.turns} and phase.drift.tokens={self.tokens} must be at least 2 each"
            )
        if not 1 <= self.positions <= self.tokens:
            raise ValueError(
                f"phase.drift.positions={self.positions} must lie between 1 and phase.drift.tokens={self.tokens}"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"phase.drift.policy={self.policy} is not known: choose {' or '.join(POLICIES)}")

    @property
    def needs(self) -> int:
        return self.turns * self.tokens

    def measure(self, context: Context) -> list[Row]:
        backend, compressor = context.backend, context.compressor
        fed = np.split(context.full.continuation[: self.needs], self.turns)
        full = backend.compress(context.full.prefill, None, Dense())
        before, seen = [], []  # the full cache before every turn, and what it made of the turn
        for turn in fed:
            before.append(backend.contents(full))
            seen.append(backend.extend(full, turn))
        cache = context.compressed.cache.copy()
        rows: list[Row] = []
        for number, turn in enumerate(fed):
            held = backend.contents(cache)
            ours, theirs = backend.extend(cache, turn), seen[number]
            aop = []
            for layer, queries in enumerate(theirs.queries):
                queries = queries[:, : self.positions]
                outputs = [
                    attention_output(queries, c.keys[layer], c.values[layer], backend.scaling)
                    for c in (held, before[number])
                ]
                aop.append(to_numpy(attention_output_perturbation(*outputs)))
            targets = like(turn[1:], theirs.logits)
            rise = negative_log_likelihood(ours.logits[:-1], targets) - negative_log_likelihood(
                theirs.logits[:-1], targets
            )
            values = {"drift/aop": np.mean(aop), "drift/delta_nll": to_numpy(rise).mean()}
            rows += [{"turn": number + 1, "metric": m, "value": float(v)} for m, v in values.items()]
            if self.policy == "recompress" and number + 1 < self.turns:
                scorer = compressor.scorer
                future = [q[:, : scorer.positions] for q in seen[number + 1].queries] if foresees(scorer) else None
                cache = compressor.recompress(cache, context.document, ours.queries, future)
        return rows + self._course(rows)

    def _course(self, rows: list[Row]) -> list[Row]:
        """First and last turn, and the slope of a least-squares line in units a turn."""
        course = []
        for metric in ("drift/aop", "drift/delta_nll"):
            values = [row["value"] for row in rows if row["metric"] == metric]
            slope = np.polyfit(np.arange(self.turns), values, 1)[0]
            named = {"first": values[0], "last": values[-1], "slope": slope}
            course += [{"metric": f"{metric}_{name}", "value": float(value)} for name, value in named.items()]
        return course
