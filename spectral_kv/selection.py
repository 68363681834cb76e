"""From scores to kept tokens: the only place where tokens are chosen, and budgets are shared out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from operator import index
from typing import Any

import numpy as np

from spectral_kv.heads import Heads
from spectral_kv.xp import Array, constant, float32, largest, like, namespace, stable_order, to_numpy

SELECTIONS = ("per_layer_perhead", "per_head")
ALLOCATIONS = ("uniform", "layer", "head", "global")


def whole(number: Any) -> bool:
    """Whether it is an integer of Python, numpy or torch; a truth value is none."""
    try:
        index(number)
    except TypeError:
        return False
    return not isinstance(number, bool | np.bool_)


@dataclass(frozen=True)
class Budget:
    """How many tokens every layer and KV head keeps, all counted.

    Parameters
    ----------
    tokens : int
        Total kept tokens, sinks and recent window included; their mean where the allocation is not uniform.
    sinks : int
        First tokens that are always kept.
    recent : int
        Last tokens that are always kept.
    selection : str
        `per_layer_perhead`: every layer and KV head chooses its own tokens. `per_head`: the KV heads of one index
        choose the same tokens in every layer, by the mean of their scores.
    allocation : str
        Who gets how much of the budget of all layers and KV heads. `uniform`: the same. `layer`: every layer its own
        number, the same for its heads, by the curves of sorted scores (KVCompose, arXiv 2509.05165). `head`: the heads
        of a layer share its budget by their scores (AdaKV, arXiv 2407.11550). `global`: so do all heads of all layers
        (KVzip, arXiv 2505.23416). Sinks and recent window are kept everywhere.
    safeguard : float
        Share of what a uniform budget leaves to choose that every head has for certain; `head` alone reads it.
    """

    tokens: int
    sinks: int = 4
    recent: int = 64
    selection: str = "per_layer_perhead"
    allocation: str = "uniform"
    safeguard: float = 0.2

    def __post_init__(self):
        for name in ("tokens", "sinks", "recent"):
            if not whole(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of tokens")
            object.__setattr__(self, name, index(getattr(self, name)))
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation={self.allocation} is not known: choose one of {', '.join(ALLOCATIONS)}")
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard} must lie in [0, 1]")
        if self.allocation != "uniform" and self.selection != "per_layer_perhead":
            raise ValueError(
                f"selection={self.selection} has all layers keep the same tokens, and allocation={self.allocation} "
                "different numbers of them: leave one of the two at its default"
            )
        if self.allocation != "uniform" and self.sinks + self.recent == 0:
            raise ValueError(
                f"sinks={self.sinks} and recent={self.recent} protect no token, and allocation={self.allocation} may "
                "leave a KV head without any: protect one at least"
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection} is not known: choose one of {', '.join(SELECTIONS)}")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} can't be negative")
        if self.tokens <= self.sinks + self.recent:
            raise ValueError(
                f"tokens={self.tokens} leaves nothing to choose beside sinks={self.sinks} and recent={self.recent}: "
                f"give at least {self.sinks + self.recent + 1} tokens, or fewer sinks and recent tokens"
            )

    @property
    def by_head(self) -> bool:
        """Whether every KV head of every layer chooses for itself, as many tokens as the others."""
        return self.allocation == "uniform" and self.selection == "per_layer_perhead"

    def with_recent_share(self, share: float) -> "Budget":
        """The same number of tokens, with this share of what the sinks leave for the most recent ones."""
        return replace(self, recent=int(share * (self.tokens - self.sinks)))

    def evictable(self, tokens: int) -> slice:
        """The positions a scorer decides about: all but sinks and recent window."""
        return slice(min(self.sinks, tokens), max(min(self.sinks, tokens), tokens - self.recent))


def not_numbers() -> ValueError:
    """What is raised of scores that are no numbers."""
    return ValueError("a scorer returned NaN; scores must be numbers for every evictable token")


def select(scores: Array, budget: Budget, later: list[Callable[[], None]] | None = None) -> Array:
    """Kept token indices for every KV head.

    Parameters
    ----------
    scores : array, [kv_heads, tokens]
        Higher is kept. Scores of sinks and recent window are not looked at.
    later : list, optional
        Where a GPU would have to be waited for to know whether scores are numbers, the question is added here, for the
        caller to ask.

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
    quota = budget.tokens - budget.sinks - budget.recent
    if getattr(scores, "is_cuda", False) and find_spec("triton") is not None:
        from spectral_kv.engine.scoring import highest

        kept, question = highest(float32(scores).contiguous(), middle, quota)
        question() if later is None else later.append(question)
        return kept
    candidates = float32(scores[:, middle])
    if bool(xp.any(xp.isnan(candidates))):
        raise not_numbers()
    chosen = largest(candidates, quota) + middle.start
    first, last = (
        xp.broadcast_to(xp.astype(constant(_span(*ends), scores), chosen.dtype), (heads, ends[1] - ends[0]))
        for ends in ((0, middle.start), (middle.stop, tokens))
    )
    return xp.concat([first, chosen, last], axis=-1)


def largest_first(row: Array) -> Array:
    """Indices that sort `[tokens]` descending; of equal ones the first comes first."""
    return stable_order(-row)


@lru_cache(maxsize=32)
def _span(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop)


def _counts(values: list[Array], quota: int) -> np.ndarray:
    """How many of the `quota` largest numbers of all `[some]` lie in each; of equal ones the first count."""
    xp = namespace(values[0])
    chosen = to_numpy(largest(xp.concat(values)[None], quota))[0]
    ends = np.cumsum([len(x) for x in values])
    return np.bincount(np.searchsorted(ends, chosen, side="right"), minlength=len(values))


def _safe(row: Array, count: int) -> Array:
    """Scores `[tokens]` with the largest `count` of them raised above all others."""
    if count == 0:
        return row
    xp = namespace(row)
    safe = np.zeros(len(row), dtype=bool)
    safe[to_numpy(largest(row[None], min(count, len(row))))[0]] = True
    return xp.where(like(safe, row), np.inf, row)


def quotas(candidates: list[list[Array]], budget: Budget) -> list[list[int]]:
    """How many of its evictable tokens every layer and KV head keeps where the allocation is not uniform.

    `candidates` are scores `[evictable]` of every layer and KV head. The sum over all is that of a uniform budget.
    """
    each, heads = budget.tokens - (budget.sinks + budget.recent), len(candidates[0])
    if budget.allocation == "layer":
        curves = []
        for layer in candidates:
            xp = namespace(layer[0])
            descending = [xp.take(row, largest_first(row), axis=0) for row in layer]
            curves.append(sum(descending) / heads)
        return [[int(count)] * heads for count in _counts(curves, each * len(candidates))]
    if budget.allocation == "global":
        found = _counts([row for layer in candidates for row in layer], each * heads * len(candidates))
        return found.reshape(len(candidates), heads).tolist()
    safe = int(budget.safeguard * each)
    return [_counts([_safe(row, safe) for row in layer], each * heads).tolist() for layer in candidates]


def _shared_out(scores: list[Heads], budget: Budget) -> list[Heads]:
    """Kept token indices where the allocation is not uniform: of a list of heads lists, one a head."""
    spans = [[budget.evictable(len(row)) for row in layer] for layer in scores]
    candidates = [
        [float32(row[span]) for row, span in zip(layer, own, strict=True)]
        for layer, own in zip(scores, spans, strict=True)
    ]
    if any(bool(namespace(row).any(namespace(row).isnan(row))) for layer in candidates for row in layer):
        raise not_numbers()
    found: list[Heads] = []
    for layer, own, rows, counts in zip(scores, spans, candidates, quotas(candidates, budget), strict=True):
        xp, kept = namespace(rows[0]), []
        for head, (span, row, count) in enumerate(zip(own, rows, counts, strict=True)):
            chosen = largest(row[None], count)[0] + span.start
            first, last = (
                xp.astype(like(np.arange(*ends), row), chosen.dtype)
                for ends in ((0, span.start), (span.stop, len(layer[head])))
            )
            kept.append(xp.concat([first, chosen, last]))
        found.append(xp.stack(kept) if budget.allocation == "layer" else kept)
    return found


def select_layers(
    scores: list[Heads] | Array, budget: Budget, later: list[Callable[[], None]] | None = None
) -> list[Heads] | Array:
    """Kept token indices `[kv_heads, kept]` of every layer from their scores `[kv_heads, tokens]`.

    Where KV heads of a layer keep different numbers of tokens, its indices are a list, one array `[kept]` a head; so
    are the scores of a layer whose heads hold different numbers already. Of scores in one array `[layers, kv_heads,
    tokens]` a uniform allocation keeps one array `[layers, kv_heads, kept]`; `later` as in `select`.
    """
    if budget.allocation != "uniform":
        return _shared_out(scores, budget)
    if budget.selection == "per_head":
        return [select(sum(float32(s) for s in scores) / len(scores), budget, later)] * len(scores)
    if hasattr(scores, "shape"):
        layers, heads, tokens = scores.shape
        xp = namespace(scores)
        return xp.reshape(select(xp.reshape(scores, (layers * heads, tokens)), budget, later), (layers, heads, -1))
    if len({tuple(s.shape) for s in scores}) > 1:
        return [select(s, budget, later) for s in scores]
    heads = scores[0].shape[0]
    joined = namespace(scores[0]).concat(list(scores), axis=0)  # one question to a device, not one a layer
    kept = select(joined, budget, later)
    return [kept[heads * i : heads * (i + 1)] for i in range(len(scores))]
