"""Refit: kept tokens get a bias, and values, by which attention is what it was before others were evicted.

Source: Attention Matching (arXiv 2602.16284): two least-squares problems for every KV head.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.heads import Heads, runs
from spectral_kv.rope import Rope
from spectral_kv.xp import Array, float32, like, namespace, to_numpy

KINDS = ("bias", "bias_values")


@dataclass(frozen=True)
class Refitted:
    """What a layer's kept tokens are given: a bias `[kv_heads, kept]`, and values `[kv_heads, kept, dim]` or None.

    Lists of `[kept]` and `[kept, dim]`, one a KV head, where heads keep different numbers of tokens.
    """

    bias: Heads
    values: Heads | None


@dataclass(frozen=True)
class Refit:
    """Fits the kept tokens of a prompt to what queries like its last would read from all of it, right after its end.

    With weights `w = exp(bias)` the kept tokens have the softmax's whole denominator, relative to it, for the reference
    queries; then values are fitted to their attention outputs. Both are least squares. Weights are drawn to one factor
    for all tokens, which makes up for what is evicted and leaves attention among those kept as it is: drawn to 1, what
    is missing would go to the tokens that are looked at most, the sinks, whose values are near 0. Values are drawn to
    the token's own. So nothing changes where nothing was evicted.

    Parameters
    ----------
    kind : str
        `bias`, or `bias_values`.
    queries : int
        Reference queries: so many of the prompt's last, turned on to the positions after it. Where they stand they read
        their neighbours most, which are evicted and will be far from whoever asks: fitted to that, kept tokens are
        worse than before.
    largest : float
        Bound of the bias, in nats, both ways.
    strength : float
        How much attention that moves from token to token counts beside what the denominators miss, both squared.
    value_strength : float
        How much values are drawn to the token's own, in units of the mean diagonal of the normal equations.
    """

    kind: str = "bias_values"
    queries: int = 256
    largest: float = 3.0
    strength: float = 100.0
    value_strength: float = 0.1

    token_nbytes: ClassVar[int] = 4  # of a bias, in every layer and KV head

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is not known: choose {' or '.join(KINDS)}")
        if self.queries < 1 or self.largest <= 0:
            raise ValueError(f"queries={self.queries} must be at least 1, and largest={self.largest} above 0")
        if self.strength <= 0 or self.value_strength <= 0:
            raise ValueError(
                f"strength={self.strength} and value_strength={self.value_strength} must be above 0: fewer queries "
                "than tokens determine nothing else"
            )

    def reference(self, queries: Array, tokens: int, rope: Rope) -> Array:
        """Rotated queries `[query_heads, reference, dim]` as if those of the last tokens were asked after the prompt.

        `queries` `[query_heads, observed, dim]` are those of the last of `tokens` tokens, rotated where they stand.
        """
        count = min(self.queries, queries.shape[1])
        last = float32(queries[:, queries.shape[1] - count :])
        there = np.arange(tokens - count, tokens)
        return rope.rotate(rope.unrotate(last, there), there + count)

    def layer(self, keys: Array, values: Array, kept: Heads, queries: Array, scaling: float) -> Refitted:
        """The refit of one layer.

        Parameters
        ----------
        keys, values : array, [kv_heads, tokens, dim]
            Of the whole prompt, as cached.
        kept : array of int, [kv_heads, kept], or a list of [kept]
        queries : array, [query_heads, reference, dim]
            Rotated queries that see the whole prompt: see `reference`.
        scaling : float
            Factor of the logits.
        """
        chosen = [row for _, (of_run,) in runs(kept) for row in of_run]
        group = len(queries) // len(keys)
        biases, refitted = [], []
        for head, own in enumerate(chosen):
            q = to_numpy(queries[head * group : (head + 1) * group])
            bias, fitted = self.head(to_numpy(keys[head]), to_numpy(values[head]), to_numpy(own), q, scaling)
            biases.append(like(bias.astype(np.float32), values))
            if fitted is not None:
                refitted.append(namespace(values).astype(like(fitted.astype(np.float32), values), values.dtype))
        if isinstance(kept, list):
            return Refitted(biases, refitted or None)
        xp = namespace(values)
        return Refitted(xp.stack(biases), xp.stack(refitted) if refitted else None)

    def head(
        self, keys: np.ndarray, values: np.ndarray, kept: np.ndarray, queries: np.ndarray, scaling: float
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Bias `[kept]` and values `[kept, dim]` of one KV head.

        From its keys and values `[tokens, dim]`, and the queries `[group, reference, dim]` of the heads that read it.
        """
        logits = (scaling * queries @ keys.T).reshape(-1, len(keys))
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        of_kept = weights[:, kept].astype(np.float64)
        evicted = np.delete(weights, kept, axis=-1).sum(axis=-1, dtype=np.float64)
        bias = np.clip(np.log(self._factors(of_kept, evicted)), -self.largest, self.largest)
        if self.kind == "bias":
            return bias, None
        shares = of_kept * np.exp(bias)
        shares /= np.maximum(shares.sum(axis=-1, keepdims=True), 1e-30)
        there = values[kept].astype(np.float64)
        missing = weights.astype(np.float64) @ values - shares @ there
        return bias, there + self._drawn(shares, missing, self.value_strength)

    def _factors(self, of_kept: np.ndarray, evicted: np.ndarray) -> np.ndarray:
        """Of kept tokens' weights `[queries, kept]`, by which they sum to what they did with the `evicted` `[queries]`.

        A common factor, times what differs between tokens: `strength` times the squares of all changes of a weight by
        that are added to those of the sums' errors.
        """
        held = of_kept.sum(axis=-1)
        common = held @ (held + evicted) / max(held @ held, 1e-30)
        scaled = common * of_kept
        gram = scaled.T @ scaled
        moved = self.strength * np.diag(gram)
        penalty = np.diag(moved + np.finfo(np.float64).eps * max(moved.mean(), np.finfo(np.float64).tiny))
        change = np.linalg.solve(gram + penalty, scaled.T @ (held + evicted - common * held))
        return common * np.maximum(1.0 + change, 1e-30)

    @staticmethod
    def _drawn(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
        """Least squares of `x b = y`, drawn to 0."""
        gram = x.T @ x
        penalty = strength * max(np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
        return np.linalg.solve(gram + penalty * np.eye(len(gram)), x.T @ y)
