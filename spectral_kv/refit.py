"""Refit: kept tokens get a bias, and values, by which attention is what it was before others were evicted.

Source: Attention Matching (arXiv 2602.16284): two least-squares problems for every KV head.
"""

from dataclasses import dataclass

import numpy as np

from spectral_kv.heads import Heads, runs
from spectral_kv.xp import Array, like, namespace, to_numpy

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
    """Fits the kept tokens of a prompt to what its last queries read from all of it.

    With weights `w = exp(bias)` the kept tokens have the softmax's whole denominator, relative to it, for the reference
    queries; then values are fitted to their attention outputs. Both are least squares that are drawn to what is there
    (a weight of 1, the token's own value), so that nothing changes where nothing was evicted.

    Parameters
    ----------
    kind : str
        `bias`, or `bias_values`.
    queries : int
        Reference queries: so many of the prompt's last. Each sees the tokens up to its own.
    largest : float
        Bound of the bias, in nats, both ways.
    strength : float
        How much weights are drawn to 1, in units of the mean diagonal of the normal equations.
    value_strength : float
        The same of values.
    """

    kind: str = "bias_values"
    queries: int = 256
    largest: float = 3.0
    strength: float = 1e-3
    value_strength: float = 1e-2

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

    def layer(self, keys: Array, values: Array, kept: Heads, queries: Array, scaling: float) -> Refitted:
        """The refit of one layer.

        Parameters
        ----------
        keys, values : array, [kv_heads, tokens, dim]
            Of the whole prompt, as cached.
        kept : array of int, [kv_heads, kept], or a list of [kept]
        queries : array, [query_heads, reference, dim]
            Rotated queries of the last tokens of the prompt.
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
        tokens, count = len(keys), queries.shape[1]
        logits = scaling * queries @ keys.T
        own = np.arange(tokens - count, tokens)[:, None]
        logits = np.where(np.arange(tokens) > own, -np.inf, logits).reshape(-1, tokens)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        of_kept = weights[:, kept].astype(np.float64)
        evicted = np.delete(weights, kept, axis=-1).sum(axis=-1, dtype=np.float64)
        factor = 1.0 + self._drawn(of_kept, evicted, self.strength)
        bias = np.clip(np.log(np.maximum(factor, 1e-30)), -self.largest, self.largest)
        if self.kind == "bias":
            return bias, None
        shares = of_kept * np.exp(bias)
        shares /= np.maximum(shares.sum(axis=-1, keepdims=True), 1e-30)
        there = values[kept].astype(np.float64)
        missing = weights.astype(np.float64) @ values - shares @ there
        return bias, there + self._drawn(shares, missing, self.value_strength)

    @staticmethod
    def _drawn(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
        """Least squares of `x b = y`, drawn to 0."""
        gram = x.T @ x
        penalty = strength * max(np.trace(gram) / len(gram), np.finfo(np.float64).tiny)
        return np.linalg.solve(gram + penalty * np.eye(len(gram)), x.T @ y)
