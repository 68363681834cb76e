"""A windowed storage: sinks and the most recent tokens as they are, everything between in the codes of a codec."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np

from spectral_kv.storage.base import Codec, Coded, Pair
from spectral_kv.xp import Array, like, namespace, rows


def part(x: Array, start: int, stop: int) -> Array:
    """Tokens `start` to `stop` as an array of their own, which does not keep the rest alive."""
    if hasattr(x, "detach"):  # torch: one copy, where indices would be brought to the device and looked through
        found = x[..., start:stop, :]
        return found.new_empty(found.shape).copy_(found)
    return namespace(x).take(x, like(np.arange(start, stop), x), axis=-2)


def _joined(*parts: Array) -> Array:
    return namespace(parts[0]).concat(list(parts), axis=-2)


@dataclass(frozen=True)
class WindowedTokens:
    """Tokens of one layer: `first` and `recent` exact, `coded` between (None until a token is coded)."""

    storage: "Windowed"
    layer: int
    first: Pair
    coded: Coded | None
    recent: Pair

    @property
    def tokens(self) -> int:
        coded = 0 if self.coded is None else self.coded.tokens
        return self.first[0].shape[-2] + coded + self.recent[0].shape[-2]

    @property
    def nbytes(self) -> int:
        coded = 0 if self.coded is None else self.coded.nbytes
        return coded + sum(x.nbytes for x in (*self.first, *self.recent))

    @property
    def codec(self) -> Codec:
        return self.storage.codec(self.layer)

    def encode(self, count: int) -> "WindowedTokens":
        """With the oldest `count` tokens of the recent window in codes."""
        if count <= 0:
            return self
        tokens = self.recent[0].shape[-2]
        coded = self.codec.encode(*(part(x, 0, count) for x in self.recent), self.coded)
        return replace(self, coded=coded, recent=tuple(part(x, count, tokens) for x in self.recent))

    def load(self) -> Pair:
        between = [()] * 2
        if self.coded is not None:
            decoded = self.codec.decode(self.coded)
            between = [(namespace(x).astype(x, self.recent[0].dtype),) for x in decoded]
        keys, values = (_joined(f, *b, r) for f, b, r in zip(self.first, between, self.recent, strict=True))
        return keys, values

    def append(self, keys: Array, values: Array) -> "WindowedTokens":
        """New tokens are exact; what they push out of the recent window is coded in chunks of `flush`.

        A chunk is always as long, so that it is the same however the tokens came: one by one or all at once.
        """
        s = self.storage
        recent = tuple(_joined(old, new) for old, new in zip(self.recent, (keys, values), strict=True))
        grown = replace(self, recent=recent)
        for _ in range((recent[0].shape[-2] - s.recent) // s.flush):
            grown = grown.encode(s.flush)
        return grown

    def take(self, kept: Array) -> "WindowedTokens":
        chosen = tuple(rows(x, kept) for x in self.load())
        count = kept.shape[-1]
        sinks = min(self.storage.sinks, count)
        middle = count - sinks - min(self.storage.recent, count - sinks)
        first = tuple(part(x, 0, sinks) for x in chosen)
        if self.coded is None:
            rest = tuple(part(x, sinks, count) for x in chosen)
            return replace(self, first=first, recent=rest).encode(middle)
        row = namespace(kept).astype(kept[..., sinks : sinks + middle], namespace(kept).int64)
        row = row - self.first[0].shape[-2]
        coded = self.codec.choose(self.coded, row, *(part(x, sinks, sinks + middle) for x in chosen))
        return replace(self, first=first, coded=coded, recent=tuple(part(x, sinks + middle, count) for x in chosen))

    def tensors(self) -> dict[str, Array]:
        exact = {f"{name}.{kind}": x for name, pair in (("first", self.first), ("recent", self.recent))
                 for kind, x in zip(("keys", "values"), pair, strict=True)}  # fmt: skip
        coded = {} if self.coded is None else self.codec.tensors(self.coded)
        return exact | {f"coded.{name}": x for name, x in coded.items()}


@dataclass(frozen=True, kw_only=True)
class Windowed(ABC):
    """Base of the storages that code what lies between sinks and recent window.

    Parameters
    ----------
    sinks, recent : int
        First and last kept tokens that stay in the dtype of the cache.
    flush : int
        Tokens fed later are coded in chunks of this many, when they have left the recent window.
    """

    sinks: int = 4
    recent: int = 128
    flush: int = 64

    def __post_init__(self):
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} can't be negative")
        if self.flush < 1:
            raise ValueError(f"flush={self.flush} must be at least 1")

    @abstractmethod
    def codec(self, layer: int) -> Codec:
        """What codes the tokens of layer number `layer`."""
        ...

    def store(self, keys: Array, values: Array, layer: int) -> WindowedTokens:
        tokens = keys.shape[-2]
        sinks = min(self.sinks, tokens)
        first, rest = (tuple(part(x, *span) for x in (keys, values)) for span in ((0, sinks), (sinks, tokens)))
        return WindowedTokens(self, layer, first, None, rest).encode(tokens - sinks - self.recent)

    def restored(self, tensors: dict[str, Array], layer: int) -> WindowedTokens:
        first, recent = ((tensors[f"{name}.keys"], tensors[f"{name}.values"]) for name in ("first", "recent"))
        codes = {name.removeprefix("coded."): x for name, x in tensors.items() if name.startswith("coded.")}
        return WindowedTokens(self, layer, first, self.codec(layer).restored(codes) if codes else None, recent)

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        exact = min(tokens, self.sinks + self.recent)
        coded = self.codec(0).nbytes(tokens - exact, kv_heads, dim, itemsize)
        return 2 * kv_heads * exact * dim * itemsize + coded
