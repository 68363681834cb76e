"""Drift: how perturbation and loss change over turns, with the cache brought back to its budget after each."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.backends.base import Contents, Extension
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import log_softmax, negative_log_likelihood
from spectral_kv.xp import Array, like, to_numpy

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

    @property
    def recompresses(self) -> bool:
        return self.policy == "recompress"

    def measure(self, context: Context) -> list[Row]:
        backend = context.backend
        full = context.once(self, lambda: self._on_the_full_cache(context))
        cache = context.compressed_cache()
        rows: list[Row] = []
        for number, (turn, (queries, outputs, loss)) in enumerate(zip(self._turns(context), full, strict=True)):
            kept = self._outputs(context, queries, backend.contents(cache))
            ours = backend.extend(cache, turn)
            aop = [to_numpy(attention_output_perturbation(*pair)) for pair in zip(kept, outputs, strict=True)]
            rise = to_numpy(self._loss(ours, turn) - loss)
            values = {"drift/aop": np.mean(aop), "drift/delta_nll": rise.mean()}
            rows += [{"turn": number + 1, "metric": m, "value": float(v)} for m, v in values.items()]
            if self.policy == "recompress" and number + 1 < self.turns:
                cache = context.recompressed(cache, ours.queries, future=full[number + 1][0])
        return rows + self._course(rows)

    def _turns(self, context: Context) -> list[np.ndarray]:
        return np.split(context.continuation[: self.needs], self.turns)

    def _on_the_full_cache(self, context: Context) -> list[tuple[list[Array], list[Array], Array]]:
        """Of every turn the queries and the attention outputs over all that is before it, one a layer, and the loss."""
        backend = context.backend
        cache = context.full_cache()
        found = []
        for turn in self._turns(context):
            before = backend.contents(cache)
            fed = backend.extend(cache, turn)
            found.append((fed.queries, self._outputs(context, fed.queries, before), self._loss(fed, turn)))
        return found

    def _outputs(self, context: Context, queries: list[Array], held: Contents) -> list[Array]:
        """What the queries of a turn's first tokens read from a cache, `[query_heads, positions, dim]` a layer."""
        scaling = context.backend.scaling
        return [held.attended(layer, q[:, : self.positions], scaling) for layer, q in enumerate(queries)]

    def _loss(self, fed: Extension, turn: np.ndarray) -> Array:
        """Nats of every token of a turn after its first, `[tokens - 1]`."""
        return negative_log_likelihood(log_softmax(fed.logits[:-1]), like(turn[1:], fed.logits))

    def _course(self, rows: list[Row]) -> list[Row]:
        """First and last turn, and the slope of a least-squares line in units a turn."""
        course = []
        for metric in ("drift/aop", "drift/delta_nll"):
            values = [row["value"] for row in rows if row["metric"] == metric]
            slope = np.polyfit(np.arange(self.turns), values, 1)[0]
            named = {"first": values[0], "last": values[-1], "slope": slope}
            course += [{"metric": f"{metric}_{name}", "value": float(value)} for name, value in named.items()]
        return course
