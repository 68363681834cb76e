"""What a backend does for who measures it, beside what compression needs."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from spectral_kv.backends.base import Backend, Cache
from spectral_kv.xp import Array


class MeasuredBackend(Backend, Protocol):
    """A backend whose time, memory and arithmetic can be looked at."""

    @staticmethod
    def place(device: str, dtype: str) -> tuple[str, str]:
        """The device and dtype that `auto` stands for on this machine."""
        ...

    def grow(self, cache: Cache, tokens: int) -> None:
        """Append tokens of zeros, for who only counts the bytes: what a token is does not change what it takes."""
        ...

    def project(self, layer: int, outputs: Array) -> Array | None:
        """What W_O of a layer makes of attention outputs `[query_heads, positions, dim]`: `[positions, hidden]`.

        None where the model names it otherwise.
        """
        ...

    def ready(self, cache: Cache, tokens: int) -> None:
        """Make all that decoding `tokens` tokens needs, so that nothing but decoding falls under a clock."""
        ...

    def steps(self, cache: Cache) -> bool:
        """Whether a cache is decoded otherwise than by forward passes of the model, as by `eagerly`."""
        ...

    def eagerly(self) -> AbstractContextManager:
        """While it lasts, tokens are decoded by forward passes of the model."""
        ...

    def floor_seconds(self, cache: Cache) -> float | None:
        """The time in which the device copies what a step has to read once: weights, and what the cache holds.

        None where nobody measures it.
        """
        ...

    def other_kernel(self) -> AbstractContextManager:
        """While it lasts, attention is computed by another kernel, which rounds differently."""
        ...

    def peak_bytes(self) -> int | None:
        """Most bytes allocated on the device since the last call, or None where nobody counts them."""
        ...

    def synchronize(self, *results: Any) -> None:
        """Wait until queued work is done, and `results`, arrays in lists, are computed, so that a clock can be read."""
        ...
