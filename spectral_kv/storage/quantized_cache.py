"""Quantised caches of transformers as storages, with the quantisers of optimum-quanto and hqq."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from array_api_compat import is_torch_array

from spectral_kv.storage.base import Pair
from spectral_kv.storage.windowed import Windowed, WindowedTokens
from spectral_kv.xp import Array, namespace

MODULES = {"quanto": ("optimum", "optimum.quanto"), "hqq": ("hqq",)}
# Either way a group is neighbouring channels of one token. At transformers' default for hqq, 0, it would be spread over
# tokens and differ with their number.
AXES = {"quanto": 0, "hqq": 1}


def _tensors(held: Any) -> Iterator[Array]:
    """The plain tensors in what a library returned: hqq a pair of codes and metadata, quanto tensors inside tensors."""
    if isinstance(held, dict):
        held = tuple(held.values())
    if isinstance(held, tuple):
        for item in held:
            yield from _tensors(item)
    elif hasattr(held, "__tensor_flatten__"):
        for name in held.__tensor_flatten__()[0]:
            yield from _tensors(getattr(held, name))
    elif is_torch_array(held):
        yield held


@dataclass(frozen=True)
class Piece:
    """Keys or values that were quantised together: what the library holds of `shape` `[..., kv_heads, tokens, dim]`."""

    layer: Any  # a QuantizedLayer of transformers, used for its quantiser alone
    held: Any
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in _tensors(self.held))

    def load(self) -> Array:
        groups = self.layer._dequantize(self.held)
        return groups.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class QuantizedPieces:
    """Keys and values of the tokens that were quantised together, in the order in which they were."""

    pairs: tuple[tuple[Piece, Piece], ...]

    @property
    def tokens(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.pairs)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in self.pairs for x in pair)


@dataclass(frozen=True)
class QuantizedCacheCodec:
    """The quantiser of `library`, on groups of `group_size` neighbouring channels of one head of one token."""

    library: str
    bits: int
    group_size: int

    def encode(self, keys: Array, values: Array, coded: QuantizedPieces | None) -> QuantizedPieces:
        before = () if coded is None else coded.pairs
        return QuantizedPieces((*before, (self.quantize(keys), self.quantize(values))))

    def decode(self, coded: QuantizedPieces) -> Pair:
        pieces = zip(*(tuple(x.load() for x in pair) for pair in coded.pairs), strict=True)
        keys, values = (namespace(x[0]).concat(list(x), axis=-2) for x in pieces)
        return keys, values

    def choose(self, coded: QuantizedPieces, row: Array, keys: Array, values: Array) -> QuantizedPieces | None:
        """Quantised tokens that stay between the exact ones are quantised again, and lose a little by it."""
        return self.encode(keys, values, None) if row.shape[-1] else None

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        groups = self._groups(kv_heads * tokens * dim, dim)
        return 2 * groups * (self.group_size * self.bits // 8 + 2 * itemsize)  # codes, a scale and a zero point

    def tensors(self, coded: QuantizedPieces) -> dict[str, Array]:
        """Those of every piece in the order in which they are found, and an empty one that has its shape and dtype."""
        found = {}
        for index, pair in enumerate(coded.pairs):
            for kind, piece in zip(("keys", "values"), pair, strict=True):
                held = list(_tensors(piece.held))
                found[f"{index}.{kind}.like"] = held[0].new_empty((0, *piece.shape), dtype=piece.layer.dtype)
                found |= {f"{index}.{kind}.{number}": x for number, x in enumerate(held)}
        return found

    def restored(self, tensors: dict[str, Array]) -> QuantizedPieces:
        """What a library makes of zeros has the same form; then the tensors in it are overwritten."""
        pairs = []
        while f"{len(pairs)}.keys.like" in tensors:
            pieces = []
            for kind in ("keys", "values"):
                start = f"{len(pairs)}.{kind}"
                like = tensors[f"{start}.like"]
                pieces.append(self.quantize(like.new_zeros(like.shape[1:])))
                with namespace(like).inference_mode():  # in which hqq makes them
                    for number, x in enumerate(_tensors(pieces[-1].held)):
                        x.copy_(tensors[f"{start}.{number}"])
            pairs.append(tuple(pieces))
        return QuantizedPieces(tuple(pairs))

    def quantize(self, x: Array) -> Piece:
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

        axis = AXES[self.library]
        kind = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}[self.library]
        layer = kind(self.bits, axis_key=axis, axis_value=axis, q_group_size=self.group_size)
        layer.lazy_initialization(x, x)  # hqq takes dtype and device from the layer
        # Three axes: quanto packs matrices with groups of 128 for a kernel, in a layout of another size.
        groups = x.reshape(1, -1, self.group_size)
        missing = self._groups(math.prod(x.shape), x.shape[-1]) - groups.shape[1]
        groups = namespace(x).concat([groups, groups[:, :1].expand(1, missing, self.group_size)], axis=1)
        return Piece(layer, layer._quantize(groups, axis), tuple(x.shape))

    def _groups(self, values: int, dim: int) -> int:
        """Groups that so many values take, filled up to whole bytes.

        hqq can't pack other numbers of groups, and quanto would give a single group a scale a channel.
        """
        if dim % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the head dimension {dim}: "
                f"set group_size={math.gcd(self.group_size, dim)}"
            )
        whole = 8 // self.bits  # both libraries pack codes of different groups into one byte
        return math.ceil(values / self.group_size / whole) * whole


@dataclass(frozen=True)
class QuantizedCacheStorage(Windowed):
    """Codes of a quantised cache of transformers, with a scale and a zero point a group in the dtype of the cache.

    The groups are `group_size` neighbouring channels of one head of one token; the quantisers are those of
    `QuantoQuantizedLayer` and `HQQQuantizedLayer`. Unlike those caches it quantises no token twice while decoding.
    Works on torch alone. quanto compiles an extension when it is first read: a C++ compiler and ninja must be on the
    path.

    Parameters
    ----------
    library : str
        `quanto` (range of every group) or `hqq` (the zero point is optimised for a sparse error).
    bits : int
        2 or 4 bits a channel.
    group_size : int
        Channels that share a scale; divides the head dimension.
    sinks, recent, flush : int
        As in `Windowed`.

    Raises
    ------
    ValueError
        If the library is not installed.
    """

    library: str = "quanto"
    bits: int = 4
    group_size: int = 64

    torch_only: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.library not in MODULES:
            raise ValueError(f"library={self.library} is not known: choose quanto or hqq")
        if self.bits not in (2, 4):
            raise ValueError(f"bits={self.bits} must be 2 or 4")
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} must be at least 2")
        if not all(find_spec(module) for module in MODULES[self.library]):
            raise ValueError(f"{self._title} needs the optional packages: pip install 'spectral-kv[quantized]'")

    @property
    def _title(self) -> str:
        return f"{self.library} at {self.bits} bits"

    def codec(self, layer: int) -> QuantizedCacheCodec:
        return QuantizedCacheCodec(self.library, self.bits, self.group_size)

    def store(self, keys: Array, values: Array, layer: int) -> WindowedTokens:
        if not is_torch_array(keys):
            raise ValueError(
                f"{self._title} holds torch tensors, not {type(keys).__module__}.{type(keys).__name__}: "
                "choose TurboQuant, which holds any array"
            )
        return super().store(keys, values, layer)
