"""What a storage does."""

from typing import Protocol

from spectral_kv.xp import Array


class Stored(Protocol):
    """Keys and values of one layer in the form in which they live between forward passes. Nothing changes it."""

    tokens: int
    nbytes: int

    def load(self) -> tuple[Array, Array]:
        """Keys and values `[..., kv_heads, tokens, dim]`, ready for attention."""
        ...

    def append(self, keys: Array, values: Array) -> "Stored":
        """With further tokens `[..., kv_heads, more, dim]` at the end."""
        ...

    def take(self, kept: Array) -> "Stored":
        """With the rows `[..., kv_heads, kept]` alone, ascending in every head."""
        ...


class Storage(Protocol):
    """Puts the kept tokens of one layer away."""

    def store(self, keys: Array, values: Array, layer: int) -> Stored:
        """Hold `[..., kv_heads, tokens, dim]` keys (rotated) and values of layer number `layer`."""
        ...

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        """Bytes that one layer of so many tokens takes, where a number of the cache takes `itemsize` bytes."""
        ...
