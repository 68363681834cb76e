"""What a backend does: run a model, and hold what it cached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from spectral_kv.attention import attention_output
from spectral_kv.heads import Heads, by_run
from spectral_kv.refit import Refitted
from spectral_kv.rope import Rope
from spectral_kv.selection import Budget
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
        A list of `[rows, dim]`, one a KV head, where those of a layer hold different numbers of rows.
    positions : list of np.ndarray, [kv_heads, rows], one a layer
        Logical positions; after per-head eviction every head has its own. A list where keys are.
    bias : list of array, [kv_heads, rows], one a layer, optional
        What attention adds to the logits of the rows. A list where keys are.
    """

    keys: list[Heads]
    values: list[Heads]
    positions: list[Heads]
    bias: list[Heads] | None = None

    def attended(self, layer: int, queries: Array, scaling: float) -> Array:
        """What queries `[query_heads, positions, dim]` that see all rows of a layer read, of the same shape."""
        held = [self.keys[layer], self.values[layer], *([] if self.bias is None else [self.bias[layer]])]

        def output(own: Array, keys: Array, values: Array, bias: Array | None = None) -> Array:
            return attention_output(own, keys, values, scaling, bias)

        return by_run(output, queries, *held)


@dataclass(frozen=True)
class Extension:
    """What feeding tokens on top of a cache gave.

    Logits `[tokens, vocabulary]`, and a layer's queries `[query_heads, tokens, dim]`.
    """

    logits: Array
    queries: list[Array]


# Called in every layer with its index, the rotated queries [query_heads, fed, dim] of what is fed, keys and values
# [kv_heads, tokens + fed, dim] of the prompt and of what is fed, and the norms [fed] of the layer's input.
Reread = Callable[[int, Array, Array, Array, Array], None]

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

    def compress(
        self,
        prefill: Prefill,
        kept: list[Heads] | None,
        storage: Storage,
        batch: int = 1,
        refitted: list[Refitted] | None = None,
    ) -> Cache:
        """A cache with the kept tokens `[kv_heads, kept]` of every layer (all tokens if None).

        A list of `[kept]`, one a KV head, where those of a layer keep different numbers. `refitted` is what the kept
        tokens of every layer are given.

        Nothing done to it changes the prefill, and it does not keep what was evicted alive. `batch` is a number of
        equal sequences, for timing.
        """
        ...

    def select_and_compress(
        self, prefill: Prefill, scores: Any, budget: Budget, storage: Storage, batch: int = 1
    ) -> tuple[Cache, Array] | None:
        """`compress` of what scores of all layers say to keep, which comes with it `[layers, kv_heads, kept]`, at once.

        `scores` are one array, a list with one a layer, or a pass of `spectral_kv.engine` over the keys. None where the
        backend doesn't do both at once: then the caller selects.
        """
        ...

    def contents(self, cache: Cache) -> Contents:
        """Keys, values and positions of everything that a cache holds."""
        ...

    def recompress(self, cache: Cache, kept: list[Heads]) -> Cache:
        """A cache with the rows `[kv_heads, kept]` of every layer of another; what is packed stays packed."""
        ...

    def extend(self, cache: Cache, tokens: np.ndarray) -> Extension:
        """Feed tokens at the cache's logical position and append them to it."""
        ...

    def reread(self, prefill: Prefill, tokens: np.ndarray, watch: Reread) -> None:
        """Feed tokens after a finished prompt, for `watch` to see; nobody keeps them, and the prefill stays."""
        ...

    def output_weights(self, layer: int) -> Array | None:
        """W_O of a layer, `[query_heads, dim, hidden]`; None where the model names it otherwise."""
        ...

    def query_bias(self, layer: int) -> Array | None:
        """Bias of W_Q of a layer, `[query_heads, dim]`; None where there is none."""
        ...

    def generate(self, cache: Cache, token: int, count: int) -> list[int]:
        """Feed `token`, then decode `count` tokens greedily; those of one sequence if the cache holds several."""
        ...
