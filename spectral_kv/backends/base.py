"""What a backend does: run a model, and hold what it cached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from spectral_kv.rope import Rope
from spectral_kv.storage.base import Storage
from spectral_kv.xp import Array


class Cache(Protocol):
    """What attention reads, in a backend's own form; extending it changes it.

    It has rows, which may be fewer than its `position`, the logical position of the next token. `batch` is its number
    of equal sequences, `nbytes` what must live to continue decoding, `allocated` the same with room to grow.
    """

    position: int
    batch: int
    nbytes: int
    allocated: int

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more at once, where tokens take room of their own."""
        ...

    def copy(self) -> "Cache":
        """A cache that can be extended without touching this one."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder that matter to its cache."""

    layers: int
    query_heads: int
    kv_heads: int
    dim: int
    vocabulary: int


@dataclass(frozen=True)
class Prefill:
    """A finished prefill; nothing changes it.

    Parameters
    ----------
    tokens : np.ndarray of int, [tokens]
    keys, values : list of array, [kv_heads, tokens, dim], one a layer
        As cached: rotated keys, in the dtype of the cache.
    queries : list of array, [query_heads, observed, dim], one a layer
        Rotated queries of the last observed tokens.
    logits : array, [vocabulary]
        Prediction of the token after the prompt.
    """

    tokens: np.ndarray
    keys: list[Array]
    values: list[Array]
    queries: list[Array]
    logits: Array

    @property
    def positions(self) -> list[np.ndarray]:
        """Logical positions `[tokens]` of the cached tokens, one a layer."""
        return [np.arange(len(self.tokens))] * len(self.keys)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.keys, *self.values, *self.queries, self.logits))


@dataclass(frozen=True)
class Contents:
    """What a cache holds, as attention reads it.

    Parameters
    ----------
    keys, values : list of array, [kv_heads, rows, dim], one a layer
    positions : list of np.ndarray, [kv_heads, rows], one a layer
        Logical positions; after per-head eviction every head has its own.
    """

    keys: list[Array]
    values: list[Array]
    positions: list[np.ndarray]


@dataclass(frozen=True)
class Extension:
    """What feeding tokens on top of a cache gave.

    Logits `[tokens, vocabulary]`, and a layer's queries `[query_heads, tokens, dim]`.
    """

    logits: Array
    queries: list[Array]


# Called in every layer, a chunk of the prompt at a time, with the layer's index, the rotated queries
# [query_heads, chunk, dim] of the chunk, and keys and values [kv_heads, seen, dim] of all tokens so far, in the cache's
# dtype. What it returns, an array or a tuple of arrays, is computed before the next chunk is fed.
Watch = Callable[[int, Array, Array, Array], Any]


class Backend(Protocol):
    """A loaded model and what compression does with it. Batch size is one; `measuring.py` has what only measures."""

    shape: ModelShape
    rope: Rope
    scaling: float

    def prefill(
        self, tokens: np.ndarray, observe: int, chunk: int | None = None, watch: Watch | None = None
    ) -> Prefill:
        """Run a prompt, whole or `chunk` tokens at a time; remember the queries of its last `observe` tokens.

        `watch` sees the queries of all of them, and nobody keeps them.
        """
        ...

    def compress(self, prefill: Prefill, kept: list[Array] | None, storage: Storage, batch: int = 1) -> Cache:
        """A cache with the kept tokens `[kv_heads, kept]` of every layer (all tokens if None).

        Nothing done to it changes the prefill, and it does not keep what was evicted alive. `batch` is a number of
        equal sequences, for timing.
        """
        ...

    def contents(self, cache: Cache) -> Contents:
        """Keys, values and positions of everything that a cache holds."""
        ...

    def recompress(self, cache: Cache, kept: list[Array]) -> Cache:
        """A cache with the rows `[kv_heads, kept]` of every layer of another; what is packed stays packed."""
        ...

    def extend(self, cache: Cache, tokens: np.ndarray) -> Extension:
        """Feed tokens at the cache's logical position and append them to it."""
        ...

    def generate(self, cache: Cache, token: int, count: int) -> list[int]:
        """Feed `token`, then decode `count` tokens greedily; those of one sequence if the cache holds several."""
        ...
