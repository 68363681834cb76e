"""From scores to kept tokens: the only place where tokens are chosen."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from spectral_kv.xp import Array, constant, float32, largest, like, namespace

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
    chosen = largest(candidates, quota) + middle.start
    first, last = (
        xp.broadcast_to(xp.astype(constant(_span(*ends), scores), chosen.dtype), (heads, ends[1] - ends[0]))
        for ends in ((0, middle.start), (middle.stop, tokens))
    )
    return xp.concat([first, chosen, last], axis=-1)


@lru_cache(maxsize=32)
def _span(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop)


def select_layers(scores: list[Array], budget: Budget) -> list[Array]:
    """Kept token indices `[kv_heads, kept]` of every layer from their scores `[kv_heads, tokens]`."""
    if budget.selection == "per_head":
        return [select(sum(float32(s) for s in scores) / len(scores), budget)] * len(scores)
    if len({tuple(s.shape) for s in scores}) > 1:
        return [select(s, budget) for s in scores]
    heads = scores[0].shape[0]
    joined = namespace(scores[0]).concat(list(scores), axis=0)  # one question to a device, not one a layer
    kept = select(joined, budget)
    return [kept[heads * i : heads * (i + 1)] for i in range(len(scores))]
