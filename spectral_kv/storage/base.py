"""What a storage does, and what a codec does for one."""

from typing import Protocol

from spectral_kv.xp import Array

Pair = tuple[Array, Array]  # keys, values


class Stored(Protocol):
    """Keys and values of one layer in the form in which they live between forward passes. Nothing changes it."""

    tokens: int
    nbytes: int

    def load(self) -> Pair:
        """Keys and values `[..., kv_heads, tokens, dim]`, ready for attention."""
        ...

    def append(self, keys: Array, values: Array) -> "Stored":
        """With further tokens `[..., kv_heads, more, dim]` at the end."""
        ...

    def take(self, kept: Array) -> "Stored":
        """With the rows `[..., kv_heads, kept]` alone, ascending in every head."""
        ...

    def tensors(self) -> dict[str, Array]:
        """All that must be written to a file, by name, for the storage's `restored`."""
        ...


class Storage(Protocol):
    """Puts the kept tokens of one layer away."""

    def store(self, keys: Array, values: Array, layer: int) -> Stored:
        """Hold `[..., kv_heads, tokens, dim]` keys (rotated) and values of layer number `layer`."""
        ...

    def restored(self, tensors: dict[str, Array], layer: int) -> Stored:
        """What `tensors` of a stored layer was taken from."""
        ...

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        """Bytes that one layer of so many tokens takes, where a number of the cache takes `itemsize` bytes."""
        ...


class Coded(Protocol):
    """Keys and values of a run of tokens of one layer in a codec's own form. Nothing changes it."""

    tokens: int
    nbytes: int  # of every array that must live, constants that were measured on the tokens included


class Codec(Protocol):
    """Turns keys and values of one layer into codes and back.

    What a codec measures once and then keeps, as a mean, lives in the codes that it makes first: whoever encodes more
    passes them along. What it derives from settings, as a rotation, is its own and not counted. A codec that treats
    layers together is the same object for all of them.
    """

    def encode(self, keys: Array, values: Array, coded: Coded | None) -> Coded:
        """`coded` (None: nothing yet) with the tokens `[..., kv_heads, more, dim]`, at least one, at the end.

        Codes that are there don't change.
        """
        ...

    def decode(self, coded: Coded) -> Pair:
        """Keys and values `[..., kv_heads, tokens, dim]` that the codes stand for."""
        ...

    def choose(self, coded: Coded, row: Array, keys: Array, values: Array) -> Coded | None:
        """Codes of `[..., kv_heads, kept, dim]`, which are the tokens `row` `[..., kv_heads, kept]` of `coded`.

        A row below 0 or beyond the last is a token without codes. `kept` may be 0; then what was measured once stays.
        """
        ...

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        """Bytes of the codes of so many tokens that were encoded together, 0 for none."""
        ...

    def tensors(self, coded: Coded) -> dict[str, Array]:
        """All that must be written to a file, by name."""
        ...

    def restored(self, tensors: dict[str, Array]) -> Coded:
        """What `tensors` was taken from."""
        ...
