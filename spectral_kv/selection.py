"""From scores to kept tokens: the only place where tokens are chosen."""

from dataclasses import dataclass, replace

import numpy as np

from spectral_kv.xp import Array, float32, like, namespace, stable_order

SELECTIONS = ("per_layer_perhead", "per_head")


@dataclass(frozen=True)
class Budget:
    """How many tokens every layer and KV head keeps, all counted.

    Parameters
    ----------
    tokens : int
        Total kept tokens, sinks and recent window included.
    sinks : int
        First tokens that are always kept.
    recent : int
        Last tokens that are always kept.
    selection : str
        `per_layer_perhead`: every layer and KV head chooses its own tokens. `per_head`: the KV heads of one index
        choose the same tokens in every layer, by the mean of their scores.
    """

    tokens: int
    sinks: int = 4
    recent: int = 64
    selection: str = "per_layer_perhead"

    def __post_init__(self):
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection} is not known: choose one of {', '.join(SELECTIONS)}")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} can't be negative")
        if self.tokens <= self.sinks + self.recent:
            raise ValueError(
                f"tokens={self.tokens} leaves nothing to choose beside sinks={self.sinks} and recent={self.recent}: "
                f"give at least {self.sinks + self.recent + 1} tokens, or fewer sinks and recent tokens"
            )

    def with_recent_share(self, share: float) -> "Budget":
        """The same number of tokens, with this share of what the sinks leave for the most recent ones."""
        return replace(self, recent=int(share * (self.tokens - self.sinks)))

    def evictable(self, tokens: int) -> slice:
        """The positions a scorer decides about: all but sinks and recent window."""
        return slice(min(self.sinks, tokens), max(min(self.sinks, tokens), tokens - self.recent))


def select(scores: Array, budget: Budget) -> Array:
    """Kept token indices for every KV head.

    Parameters
    ----------
    scores : array, [kv_heads, tokens]
        Higher is kept. Scores of sinks and recent window are not looked at.

    Returns
    -------
    array of int, [kv_heads, min(budget.tokens, tokens)]
        Ascending. Equal scores go to the lowest index.

    Raises
    ------
    ValueError
        If a score that decides is not a number.
    """
    xp = namespace(scores)
    heads, tokens = scores.shape
    if budget.tokens >= tokens:  # nothing to choose
        return like(np.tile(np.arange(tokens), (heads, 1)), scores)
    middle = budget.evictable(tokens)
    candidates = float32(scores[:, middle])
    if bool(xp.any(xp.isnan(candidates))):
        raise ValueError("a scorer returned NaN; scores must be numbers for every evictable token")
    quota = budget.tokens - budget.sinks - budget.recent
    chosen = xp.sort(stable_order(-candidates)[:, :quota], axis=-1) + middle.start
    first = like(np.tile(np.arange(middle.start), (heads, 1)), scores)
    last = like(np.tile(np.arange(middle.stop, tokens), (heads, 1)), scores)
    return xp.concat([xp.astype(first, chosen.dtype), chosen, xp.astype(last, chosen.dtype)], axis=-1)


def select_layers(scores: list[Array], budget: Budget) -> list[Array]:
    """Kept token indices `[kv_heads, kept]` of every layer from their scores `[kv_heads, tokens]`."""
    if budget.selection == "per_head":
        return [select(sum(float32(s) for s in scores) / len(scores), budget)] * len(scores)
    return [select(s, budget) for s in scores]
