"""TurboQuant storage: sinks and recent window as they are, everything between in packed codes."""

from dataclasses import dataclass, replace

import numpy as np

from spectral_kv.quantization.turboquant import Packed, TurboQuant
from spectral_kv.xp import Array, like, namespace, rows

Pair = tuple[Array, Array]  # keys, values


def _part(x: Array, start: int, stop: int) -> Array:
    """Tokens `start` to `stop` as an array of their own, which does not keep the rest alive."""
    return namespace(x).take(x, like(np.arange(start, stop), x), axis=-2)


def _joined(*parts: Array) -> Array:
    return namespace(parts[0]).concat(list(parts), axis=-2)


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of one layer: `first` and `recent` exact, `packed` between (None until a token is packed)."""

    storage: "TurboQuantStorage"
    layer: int
    first: Pair
    packed: tuple[Packed, Packed] | None
    recent: Pair

    @property
    def tokens(self) -> int:
        packed = 0 if self.packed is None else self.packed[0].scale.shape[-1]
        return self.first[0].shape[-2] + packed + self.recent[0].shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.first, *(self.packed or ()), *self.recent))

    def _quantizers(self) -> tuple[TurboQuant, TurboQuant]:
        s = self.storage
        return (
            TurboQuant(s.key_bits, (s.seed, self.layer, 0), "renorm", s.center_keys, s.rotation),
            TurboQuant(s.value_bits, (s.seed, self.layer, 1), "unbiased", False, s.rotation),
        )

    def pack(self, count: int) -> "PackedTokens":
        """With the oldest `count` tokens of the recent window packed. The mean key is that of the first packing."""
        if count <= 0:
            return self
        tokens = self.recent[0].shape[-2]
        old = self.packed or (None, None)
        new = [
            q.encode(_part(x, 0, count), None if p is None else p.mean)
            for q, x, p in zip(self._quantizers(), self.recent, old, strict=True)
        ]
        packed = tuple(n if p is None else p.append(n) for p, n in zip(old, new, strict=True))
        return replace(self, packed=packed, recent=tuple(_part(x, count, tokens) for x in self.recent))

    def load(self) -> tuple[Array, Array]:
        decoded = [()] * 2
        if self.packed is not None:
            vectors = (q.decode(p) for q, p in zip(self._quantizers(), self.packed, strict=True))
            decoded = [(namespace(x).astype(x, self.recent[0].dtype),) for x in vectors]
        keys, values = (_joined(f, *d, r) for f, d, r in zip(self.first, decoded, self.recent, strict=True))
        return keys, values

    def append(self, keys: Array, values: Array) -> "PackedTokens":
        """New tokens stay exact; what they push out of the recent window is packed in chunks of `flush`."""
        s = self.storage
        overflow = self.recent[0].shape[-2] - s.recent
        flushed = self.pack(overflow // s.flush * s.flush)
        recent = tuple(_joined(old, new) for old, new in zip(flushed.recent, (keys, values), strict=True))
        return replace(flushed, recent=recent)

    def take(self, kept: Array) -> "PackedTokens":
        chosen = tuple(rows(x, kept) for x in self.load())
        sinks = min(self.storage.sinks, kept.shape[-1])
        recent = min(self.storage.recent, kept.shape[-1] - sinks)
        middle = kept.shape[-1] - sinks - recent
        first = tuple(_part(x, 0, sinks) for x in chosen)
        empty = None
        if self.packed is not None:
            no_rows = kept[..., :0]
            empty = tuple(p.take(no_rows) for p in self.packed)  # carries the frozen mean
        rest = tuple(_part(x, sinks, kept.shape[-1]) for x in chosen)
        taken = PackedTokens(self.storage, self.layer, first, empty, rest).pack(middle)
        return self._with_own_codes(taken, kept[..., sinks : sinks + middle])

    def _with_own_codes(self, taken: "PackedTokens", kept: Array) -> "PackedTokens":
        """`taken`, where rows `kept` are packed, with the codes of those that are packed here.

        Encoding what was decoded would round some scalars to their neighbour, at every choice in the same direction.
        """
        count = 0 if self.packed is None else self.packed[0].scale.shape[-1]
        if count == 0:
            return taken
        xp = namespace(kept)
        row = xp.astype(kept, xp.int64) - self.first[0].shape[-2]
        here = (row >= 0) & (row < count)
        packed = []
        for again, own in zip(taken.packed, self.packed, strict=True):
            own = own.take(xp.clip(row, 0, count - 1))
            codes = xp.where(here[..., None], own.codes, again.codes)
            packed.append(Packed(codes, xp.where(here, own.scale, again.scale), again.mean))
        return replace(taken, packed=tuple(packed))


@dataclass(frozen=True)
class TurboQuantStorage:
    """TurboQuant codes with one float16 scalar a vector.

    Parameters
    ----------
    key_bits, value_bits : int
        2, 3 or 4 bits a channel.
    sinks, recent : int
        First and last kept tokens that stay in the dtype of the cache.
    flush : int
        Tokens fed later are packed in chunks of this many, when they have left the recent window.
    center_keys : bool
        Subtract the mean key of each head first; needed where keys carry a large constant part (Qwen2 biases).
    rotation : str
        `haar` or `hadamard`.
    seed : int
        Of the random rotations, one a layer for keys and one for values. They are derived from it, not part of a cache,
        and not counted in its bytes.
    """

    key_bits: int = 4
    value_bits: int = 4
    sinks: int = 4
    recent: int = 128
    flush: int = 64
    center_keys: bool = True
    rotation: str = "haar"
    seed: int = 0

    def __post_init__(self):
        if self.key_bits not in (2, 3, 4) or self.value_bits not in (2, 3, 4):
            raise ValueError(
                f"storage.key_bits={self.key_bits} and storage.value_bits={self.value_bits} must be 2, 3 or 4"
            )
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"storage.sinks={self.sinks} and storage.recent={self.recent} can't be negative")
        if self.flush < 1:
            raise ValueError(f"storage.flush={self.flush} must be at least 1")
        if self.rotation not in ("haar", "hadamard"):
            raise ValueError(f"storage.rotation={self.rotation} is not known: choose haar or hadamard")

    def store(self, keys: Array, values: Array, layer: int) -> PackedTokens:
        tokens = keys.shape[-2]
        sinks = min(self.sinks, tokens)
        first, rest = (tuple(_part(x, *span) for x in (keys, values)) for span in ((0, sinks), (sinks, tokens)))
        return PackedTokens(self, layer, first, None, rest).pack(tokens - sinks - self.recent)

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        exact = min(tokens, self.sinks + self.recent)
        packed = tokens - exact
        vectors = dim * (self.key_bits + self.value_bits) // 8 + 2 * 2  # codes of a key and a value, two scalars
        mean = kv_heads * dim * 2 if self.center_keys and packed else 0
        return kv_heads * (exact * 2 * dim * itemsize + packed * vectors) + mean
