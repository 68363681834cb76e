"""TurboQuant storage: sinks and recent window as they are, everything between in packed codes."""

from dataclasses import dataclass

from spectral_kv.quantization.turboquant import PackedVectors, TurboQuant
from spectral_kv.storage.base import Pair
from spectral_kv.storage.windowed import Windowed
from spectral_kv.xp import Array, namespace


@dataclass(frozen=True)
class PackedPair:
    """Packed keys and values of the same tokens."""

    keys: PackedVectors
    values: PackedVectors

    @property
    def tokens(self) -> int:
        return self.keys.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class TurboQuantCodec:
    """A quantiser for keys and one for values. The mean key is that of the tokens packed first."""

    keys: TurboQuant
    values: TurboQuant

    def encode(self, keys: Array, values: Array, coded: PackedPair | None) -> PackedPair:
        if coded is None:
            return PackedPair(self.keys.encode(keys), self.values.encode(values))
        more = self.keys.encode(keys, coded.keys.mean), self.values.encode(values)
        return PackedPair(coded.keys.append(more[0]), coded.values.append(more[1]))

    def decode(self, coded: PackedPair) -> Pair:
        return self.keys.decode(coded.keys), self.values.decode(coded.values)

    def choose(self, coded: PackedPair, row: Array, keys: Array, values: Array) -> PackedPair:
        """Tokens that have codes keep them.

        Encoding what was decoded would round some scalars to their neighbour, at every choice in the same direction.
        """
        if row.shape[-1] == 0:
            return PackedPair(coded.keys.take(row), coded.values.take(row))
        again = self.keys.encode(keys, coded.keys.mean), self.values.encode(values)
        if coded.tokens == 0:
            return PackedPair(*again)
        xp = namespace(row)
        here = (row >= 0) & (row < coded.tokens)
        own = (x.take(xp.clip(row, 0, coded.tokens - 1)) for x in (coded.keys, coded.values))
        return PackedPair(*(new.where(here, old) for new, old in zip(again, own, strict=True)))

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        vectors = dim * (self.keys.bits + self.values.bits) // 8 + 2 * 2  # codes of a key and a value, two scalars
        mean = kv_heads * dim * 2 if self.keys.center and tokens else 0
        return kv_heads * tokens * vectors + mean

    def tensors(self, coded: PackedPair) -> dict[str, Array]:
        named = {"keys": coded.keys, "values": coded.values}
        held = {f"{kind}.{part}": getattr(x, part) for kind, x in named.items() for part in ("codes", "scale", "mean")}
        return {name: x for name, x in held.items() if x is not None}

    def restored(self, tensors: dict[str, Array]) -> PackedPair:
        return PackedPair(*(
            PackedVectors(tensors[f"{kind}.codes"], tensors[f"{kind}.scale"], tensors.get(f"{kind}.mean"))
            for kind in ("keys", "values")
        ))  # fmt: skip


@dataclass(frozen=True)
class TurboQuantStorage(Windowed):
    """TurboQuant codes with one float16 scalar a vector.

    Parameters
    ----------
    key_bits, value_bits : int
        2, 3 or 4 bits a channel.
    center_keys : bool
        Subtract the mean key of each head first; needed where keys carry a large constant part (Qwen2 biases).
    rotation : str
        `haar` or `hadamard`.
    seed : int
        Of the random rotations, one a layer for keys and one for values. They are derived from it, not part of a cache,
        and not counted in its bytes.
    sinks, recent, flush : int
        As in `Windowed`.
    """

    key_bits: int = 4
    value_bits: int = 4
    center_keys: bool = True
    rotation: str = "haar"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.key_bits not in (2, 3, 4) or self.value_bits not in (2, 3, 4):
            raise ValueError(f"key_bits={self.key_bits} and value_bits={self.value_bits} must be 2, 3 or 4")
        if self.rotation not in ("haar", "hadamard"):
            raise ValueError(f"rotation={self.rotation} is not known: choose haar or hadamard")

    def codec(self, layer: int) -> TurboQuantCodec:
        return TurboQuantCodec(
            TurboQuant(self.key_bits, (self.seed, layer, 0), "renorm", self.center_keys, self.rotation),
            TurboQuant(self.value_bits, (self.seed, layer, 1), "unbiased", False, self.rotation),
        )
