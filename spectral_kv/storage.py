"""How kept tokens are held: as they are, or packed by TurboQuant. Any scorer combines with any storage."""

from dataclasses import dataclass
from typing import Protocol

from spectral_kv.quantization.turboquant import TurboQuant
from spectral_kv.xp import Array, namespace


class Stored(Protocol):
    """Keys and values of one layer in the form in which they live between forward passes."""

    tokens: int
    nbytes: int

    def load(self) -> tuple[Array, Array]:
        """Keys and values `[kv_heads, tokens, dim]`, ready for attention."""
        ...


class Storage(Protocol):
    """Puts the kept tokens of one layer away."""

    def store(self, keys: Array, values: Array, layer: int) -> Stored:
        """Hold `[kv_heads, tokens, dim]` keys (rotated) and values of layer number `layer`."""
        ...


@dataclass(frozen=True)
class DenseTokens:
    keys: Array
    values: Array

    @property
    def tokens(self) -> int:
        return self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def load(self) -> tuple[Array, Array]:
        return self.keys, self.values


@dataclass(frozen=True)
class Dense:
    """Keys and values in the dtype of the cache."""

    def store(self, keys: Array, values: Array, layer: int) -> DenseTokens:
        return DenseTokens(keys, values)


class PackedTokens:
    """Sinks and recent window in the dtype of the cache, everything between as TurboQuant codes."""

    def __init__(self, storage: "TurboQuantStorage", keys: Array, values: Array, layer: int):
        self.tokens = keys.shape[-2]
        self._dtype = keys.dtype
        self._quantizers = (
            TurboQuant(storage.key_bits, (storage.seed, layer, 0), "renorm", storage.center_keys),
            TurboQuant(storage.value_bits, (storage.seed, layer, 1), "unbiased", center=False),
        )
        first = min(storage.sinks, self.tokens)
        last = max(first, self.tokens - storage.recent)
        self._exact = [(x[..., :first, :], x[..., last:, :]) for x in (keys, values)]
        self._packed = [q.encode(x[..., first:last, :]) for q, x in zip(self._quantizers, (keys, values), strict=True)]

    @property
    def nbytes(self) -> int:
        exact = sum(part.nbytes for parts in self._exact for part in parts)
        return exact + sum(x.nbytes for p in self._packed for x in (p.codes, p.scale, p.mean) if x is not None)

    def load(self) -> tuple[Array, Array]:
        xp = namespace(self._exact[0][0])
        decoded = (xp.astype(q.decode(p), self._dtype) for q, p in zip(self._quantizers, self._packed, strict=True))
        keys, values = (xp.concat([e[0], d, e[1]], axis=-2) for e, d in zip(self._exact, decoded, strict=True))
        return keys, values


@dataclass(frozen=True)
class TurboQuantStorage:
    """TurboQuant codes with one float16 scalar a vector.

    Parameters
    ----------
    key_bits, value_bits : int
        2, 3 or 4 bits a channel.
    sinks, recent : int
        First and last kept tokens that stay in the dtype of the cache.
    center_keys : bool
        Subtract the mean key of each head first; needed where keys carry a large constant part (Qwen2 biases).
    seed : int
        Of the random rotations, one a layer for keys and one for values. They are derived from it, not part of a cache,
        and not counted in its bytes.
    """

    key_bits: int = 4
    value_bits: int = 4
    sinks: int = 4
    recent: int = 128
    center_keys: bool = True
    seed: int = 0

    def __post_init__(self):
        if self.key_bits not in (2, 3, 4) or self.value_bits not in (2, 3, 4):
            raise ValueError(
                f"storage.key_bits={self.key_bits} and storage.value_bits={self.value_bits} must be 2, 3 or 4"
            )
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"storage.sinks={self.sinks} and storage.recent={self.recent} can't be negative")

    def store(self, keys: Array, values: Array, layer: int) -> PackedTokens:
        return PackedTokens(self, keys, values, layer)
