"""What a scorer gets and what it must say about itself."""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol

import numpy as np

from spectral_kv.calibration import QueryStatistics
from spectral_kv.rope import Rope
from spectral_kv.xp import Array, constant, float32, lengths, namespace, over_tokens


@dataclass
class LayerView:
    """One layer of a finished prefill, as a scorer sees it.

    Parameters
    ----------
    keys, values : array, [kv_heads, tokens, dim]
        As cached: keys are rotated.
    rope : Rope
        The model's rotation.
    positions : np.ndarray, [tokens] or [kv_heads, tokens]
        Logical positions of the cached tokens; after an eviction every head has its own.
    evictable : slice
        The positions the budget leaves to the scorer (sinks and recent window are kept anyway).
    scaling : float
        Factor of the model's attention logits, usually `dim ** -0.5`.
    index : int
        Of the layer.
    seed : tuple of int
        Differs between documents and layers; what is random draws from it.
    queries : array, [query_heads, observed, dim], optional
        Rotated queries of the last `observed` tokens.
    future : array, [query_heads, positions, dim], optional
        Rotated queries of the tokens that follow; for oracles.
    statistics : QueryStatistics, optional
        Calibrated query statistics of the model.
    gathered : optional
        What the scorer's own `gather` returned for earlier queries, or its `repeated` for the whole prompt.
    projection : array, [query_heads, dim, hidden], optional
        W_O of the layer, by which attention outputs of every query head are multiplied.
    query_bias : array, [query_heads, dim], optional
        Bias of W_Q, where the model has one.
    first_head : int
        KV head of the layer that is the view's first: heads that hold different tokens are seen one by one.

    Raises
    ------
    ValueError
        If nothing may be evicted: then there is nothing to score.
    """

    keys: Array
    values: Array
    rope: Rope
    positions: np.ndarray
    evictable: slice
    _: KW_ONLY
    scaling: float
    index: int = 0
    seed: tuple[int, ...] = (0,)
    queries: Array | None = None
    future: Array | None = None
    statistics: QueryStatistics | None = None
    gathered: Any = None
    projection: Array | None = None
    query_bias: Array | None = None
    first_head: int = 0

    def __post_init__(self):
        if not len(range(self.tokens)[self.evictable]):
            raise ValueError(
                f"none of {self.tokens} tokens may be evicted (evictable is {self.evictable.start} to "
                f"{self.evictable.stop}): keep them all instead of scoring them"
            )

    @property
    def tokens(self) -> int:
        return self.keys.shape[1]

    def last_queries(self, count: int | None = None) -> Array:
        """Rotated queries `[query_heads, count, dim]` of the last `count` tokens; of all observed ones if None.

        Fewer where fewer were observed.
        """
        if self.queries is None:
            raise ValueError(
                "the scorer reads queries and was given none: pass `queries`, those of the last tokens, "
                "as [query_heads, observed, dim]"
            )
        return self.queries if count is None else self.queries[:, max(self.queries.shape[1] - count, 0) :]

    @cached_property
    def unrotated(self) -> Array:
        """Keys before RoPE, float32 `[kv_heads, tokens, dim]`."""
        return self.rope.unrotate(float32(self.keys), self.positions)

    @cached_property
    def key_norms(self) -> Array:
        """Euclidean norm of every key, float32 `[kv_heads, tokens]`; the rotation does not change it."""
        return norms(self.keys)


@dataclass(frozen=True)
class Repetition:
    """One layer while the model repeats a part of its prompt.

    Parameters
    ----------
    keys, values : array, [kv_heads, tokens, dim]
        Of the prompt, as cached.
    span : slice
        The part of the prompt that is repeated.
    queries : array, [query_heads, fed, dim]
        Rotated queries of what is fed after the prompt: an instruction, and the part again.
    fed_keys : array, [kv_heads, fed, dim]
        Its rotated keys.
    inputs : array, [fed]
        Norms of the layer's input at the fed tokens.
    scaling : float
        As in `LayerView`.
    projection : array, [query_heads, dim, hidden], optional
        As in `LayerView`.
    """

    keys: Array
    values: Array
    span: slice
    queries: Array
    fed_keys: Array
    inputs: Array
    scaling: float
    projection: Array | None = None


def projected_norms(values: Array, projection: Array, order: int) -> Array:
    """Norms of order 1 or 2 of `W_O v` for every query head, float32 `[query_heads, tokens]`.

    `values` is `[kv_heads, tokens, dim]`, `projection` `[query_heads, dim, hidden]`.
    """
    xp = namespace(values)
    group = projection.shape[0] // values.shape[0]
    projection = float32(projection)
    if order == 2:  # by the Gram matrix of W_O: `dim` numbers a token instead of `hidden`
        gram = xp.matmul(projection, xp.permute_dims(projection, (0, 2, 1)))

        def squares(some: Array, head: int) -> Array:
            some = float32(some)
            return xp.sqrt(xp.clip(xp.sum(xp.matmul(some, gram[head]) * some, axis=-1), 0.0, None))

        return xp.stack([squares(values[head // group], head) for head in range(len(projection))])
    found = []
    for head in range(len(projection)):
        own = values[head // group][None]
        found.append(
            over_tokens(
                lambda some, head=head: xp.sum(xp.abs(xp.matmul(float32(some), projection[head])), axis=-1),
                own,
                1 + 2 * projection.shape[-1] // own.shape[-1],
            )
        )
    return xp.concat(found, axis=0)


def norms(x: Array) -> Array:
    """Euclidean norms of `[heads, tokens, dim]`, float32 `[heads, tokens]`."""
    return over_tokens(lengths, x)


class Scorer(Protocol):
    """Gives every cached token of a layer a number; higher means keep. It never selects, pads or protects.

    `reads` declares what it looks at: `keys`, `values`, `queries`, `calibration`, `future`, `projection`, `repetition`.
    A scorer that reads queries has a field `window`, how many of the last prompt tokens' queries it wants (None: all);
    one that reads the future, a field `horizon`, how many tokens of it.

    A scorer that reads the repetition has `repetitions(tokens, encode)`, which says what to feed after a finished
    prompt, and `repeated(seen)`, the scores `[kv_heads, span]` by one part of it as a `Repetition` shows it; `score`
    finds those of the whole prompt in `layer.gathered`.

    A scorer that wants all queries may have `gather(layer)`: what it takes from `layer.queries` on top of
    `layer.gathered`, an array or a tuple of arrays. It is called while the prompt runs, whose queries then need not be
    kept; `score` finds the last result in `layer.gathered`, and no queries.

    A scorer whose paper fixes the share of the budget that goes to the most recent tokens has a field `recent_share`,
    which selection honours; None leaves it to the budget.
    """

    reads: ClassVar[tuple[str, ...]]

    def score(self, layer: LayerView) -> Array:
        """Scores `[kv_heads, tokens]`."""
        ...


def unit(x: Array, evictable: slice) -> Array:
    """Min-max of `[heads, tokens]` within every head over the evictable tokens; a constant head becomes zero."""
    xp = namespace(x)
    middle = x[:, evictable]
    low = xp.min(middle, axis=-1, keepdims=True)
    span = xp.max(middle, axis=-1, keepdims=True) - low
    return (x - low) / xp.where(span > 0, span, xp.ones_like(span))


def recency(layer: LayerView) -> Array:
    """0 for the first token to 1 for the last, `[1, tokens]`."""
    return constant(_ramp(layer.tokens), layer.keys)


@lru_cache(maxsize=4)
def _ramp(tokens: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, tokens, dtype=np.float32)[None]
