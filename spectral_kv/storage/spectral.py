"""Spectral storage: layers of a group in the codes of one transform coder, sinks and recent window exact."""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np

from spectral_kv.codec.bases import Bases, Block, by_head, centred
from spectral_kv.codec.fixed_rate import Codes, FixedRate
from spectral_kv.codec.rates import Rate, rate
from spectral_kv.rope import Rope
from spectral_kv.storage.base import Pair
from spectral_kv.xp import Array, namespace


@lru_cache(maxsize=4)
def _read(
    path: str, shape: tuple[int, int, int], model: str | None, layers: int | None, transform: bool, changed: int
) -> Bases:
    found = Bases.load(path, shape, model)
    found = found if layers is None else found.regrouped(layers)
    return found if transform else found.channels()


def read(
    path: str | None, shape: tuple[int, int, int], model: str | None, layers: int | None, transform: bool = True
) -> Bases:
    """Bases from a file, in groups of at most `layers` layers; see `SpectralStorage.read`."""
    if path is None:
        raise ValueError("bases=None: this storage needs bases that were measured on the model")
    return _read(path, shape, model, layers, transform, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


def _own(pairs: list[Pair], start: int, stop: int) -> list[Pair]:
    """Tokens `start` to `stop` of every layer, by one copy for all, which keeps nothing else alive."""
    parts = [x[..., start:stop, :] for pair in pairs for x in pair]
    together = namespace(parts[0]).stack(parts)
    return [(together[i], together[i + 1]) for i in range(0, len(parts), 2)]


def encoded(coder: FixedRate, keys: list[Array], values: list[Array], positions: np.ndarray, rope: Rope) -> Codes:
    """Codes of rotated keys and values `[..., kv_heads, tokens, dim]` of the layers of a group."""
    if getattr(keys[0], "is_cuda", False) and find_spec("triton") is not None:
        from spectral_kv.engine import coding

        if coding.suits(keys, values):
            return coding.encode(coder, keys, values, positions, rope)
    return coder.encode_centred(centred(keys, values, positions, rope, coder.mean))


def _joined(*parts: Array) -> Array:
    return namespace(parts[0]).concat(list(parts), axis=-2)


@dataclass
class Group:
    """Tokens of the layers of a block at one moment: the exact ones layer by layer, the codes in common.

    A forward pass makes a new one when it reaches the first layer and completes it layer by layer, so that copies of a
    cache may go on from the same one, and sequences of a batch that shared it until then.

    Parameters
    ----------
    storage : SpectralStorage
    coder : FixedRate
    rope : Rope
    first : list of Pair
        Sinks of every layer.
    recent : list of Pair
        Tokens after those that are coded, of every layer.
    positions : np.ndarray of int, [tokens]
        Logical positions of all tokens that have been stored, in the order of the rows.
    seen : int
        Logical position of the next token.
    codes : Codes or None
    """

    storage: "SpectralStorage"
    coder: FixedRate
    rope: Rope
    first: list[Pair]
    recent: list[Pair]
    positions: np.ndarray
    seen: int
    codes: Codes | None = None
    next: "dict[int, Group]" = field(default_factory=dict, repr=False)  # by row of the batch, while layers are fed
    decoded: Array | None = field(default=None, repr=False)  # components, while a forward pass reads them

    @property
    def layers(self) -> int:
        """Layers of the group, whether they are all there or not."""
        return len(self.coder.mean) // (2 * self.first[0][0].shape[-3] * self.first[0][0].shape[-1])

    @property
    def coded(self) -> int:
        return 0 if self.codes is None else self.codes.tokens

    @property
    def sinks(self) -> int:
        return self.first[0][0].shape[-2]

    @property
    def coded_positions(self) -> np.ndarray:
        return self.positions[self.sinks : self.sinks + self.coded]

    @property
    def coded_nbytes(self) -> int:
        """Bytes of codes and, where tokens were evicted, of their positions in 32 bits."""
        if self.codes is None:
            return 0
        at = self.coded_positions
        return self.codes.nbytes + (0 if at[-1] - at[0] == len(at) - 1 else 4 * len(at))

    def grown(self) -> "Group":
        return Group(
            self.storage, self.coder, self.rope, self.first, list(self.recent), self.positions, self.seen, self.codes
        )

    def append(self, index: int, keys: Array, values: Array) -> None:
        """New tokens of layer number `index` of the group."""
        self.recent[index] = tuple(
            _joined(old, new) for old, new in zip(self.recent[index], (keys, values), strict=True)
        )
        if index == 0:
            more = keys.shape[-2]
            self.positions = np.concatenate([self.positions, np.arange(self.seen, self.seen + more)])
            self.seen += more

    def encode(self, count: int) -> None:
        """Code the oldest `count` tokens of the recent window."""
        if count <= 0:
            return
        start = self.sinks + self.coded
        oldest = [[x[..., :count, :] for x in kind] for kind in zip(*self.recent, strict=True)]
        codes = encoded(self.coder, *oldest, self.positions[start : start + count], self.rope)
        self.codes = codes if self.codes is None else self.codes.append(codes)
        self.recent = _own(self.recent, count, self.recent[0][0].shape[-2])

    def settle(self) -> None:
        """Code what has left the recent window, in chunks of `flush`: all layers have got their tokens."""
        self.decoded = None
        overflow = self.recent[0][0].shape[-2] - self.storage.recent
        self.encode(overflow // self.storage.flush * self.storage.flush)

    def load(self, index: int) -> Pair:
        """Keys, rotated, and values of layer number `index` of the group, ready for attention."""
        first, recent = self.first[index], self.recent[index]
        if self.codes is None:
            return tuple(_joined(a, b) for a, b in zip(first, recent, strict=True))
        if self.decoded is None:
            self.decoded = self.coder.components(self.codes)
        layers, (heads, dim) = len(self.recent), (first[0].shape[-3], first[0].shape[-1])
        between = []
        for at in (index, layers + index):
            restored = self.coder.restore(self.decoded, at * heads * dim, (at + 1) * heads * dim)
            between.append(by_head(restored, dim))
        between[0] = self.rope.rotate(between[0], self.coded_positions)
        dtype = recent[0].dtype
        return tuple(
            _joined(a, namespace(b).astype(b, dtype), c) for a, b, c in zip(first, between, recent, strict=True)
        )


@dataclass(frozen=True)
class SpectralTokens:
    """Tokens of one layer of a group. The codes are counted with its first layer."""

    group: Group
    index: int

    @property
    def tokens(self) -> int:
        return self.group.sinks + self.group.coded + self.group.recent[self.index][0].shape[-2]

    @property
    def nbytes(self) -> int:
        exact = sum(x.nbytes for x in (*self.group.first[self.index], *self.group.recent[self.index]))
        return exact + (self.group.coded_nbytes if self.index == 0 else 0)

    def load(self) -> Pair:
        return self.group.load(self.index)

    def append(self, keys: Array, values: Array, row: int = 0) -> "SpectralTokens":
        """With further tokens of row number `row` of a batch whose sequences are fed in turn, layer by layer."""
        before = self.group
        if self.index == 0:
            before.next[row] = before.grown()
        group = before.next[row] if self.index < len(before.recent) - 1 else before.next.pop(row)
        group.append(self.index, keys, values)
        return SpectralTokens(group, self.index)

    def tensors(self) -> dict[str, Array]:
        """All that must be written to a file, by name; the codes with the first layer of the group."""
        group = self.group
        exact = {"first": group.first[self.index], "recent": group.recent[self.index]}
        held = {f"{name}.{kind}": x for name, pair in exact.items()
                for kind, x in zip(("keys", "values"), pair, strict=True)}  # fmt: skip
        if self.index == 0 and group.codes is not None:
            held |= {"codes.packed": group.codes.packed, "codes.gains": group.codes.gains}
        return held

    def settle(self) -> None:
        """What follows when a forward pass has read the last layer of the group."""
        if self.index == len(self.group.recent) - 1:
            self.group.settle()


class Arriving:
    """A sequence whose layers come one by one: each group is coded when its last layer is there.

    Parameters
    ----------
    storage : SpectralStorage
    layers : int
        Of the model.
    rope : Rope
    """

    def __init__(self, storage: "SpectralStorage", layers: int, rope: Rope):
        self.storage, self.layers, self.rope = storage, layers, rope
        self.arrived = 0
        self._group: Group | None = None
        self._coders: list[tuple[Block, FixedRate]] = []

    def _opened(self, keys: Array, positions: np.ndarray, seen: int) -> tuple[Group, int]:
        """The group that the next layer, with such keys, belongs to, and its number in it."""
        if self.arrived == 0:
            shape, itemsize = (self.layers, keys.shape[-3], keys.shape[-1]), keys.nbytes // int(np.prod(keys.shape))
            coders = self.storage.rate(keys.shape[-2], shape, itemsize).coders
            self._coders = list(zip(self.storage.read(shape).blocks, coders, strict=True))
        block, coder = next(pair for pair in self._coders if self.arrived in pair[0].layers)
        index = self.arrived - block.layers[0]
        if index == 0:
            self._group = Group(self.storage, coder, self.rope, [], [], positions, seen)
        self.arrived += 1
        return self._group, index

    def add(self, keys: Array, values: Array, positions: np.ndarray, seen: int) -> SpectralTokens:
        """Hold the next layer; arguments as of `SpectralStorage.store_together`."""
        group, index = self._opened(keys, positions, seen)
        tokens, sinks = keys.shape[-2], min(self.storage.sinks, keys.shape[-2])
        group.first.append((keys[..., :sinks, :], values[..., :sinks, :]))
        group.recent.append((keys[..., sinks:, :], values[..., sinks:, :]))
        if len(group.recent) == group.layers:
            group.first = _own(group.first, 0, sinks)
            if (coded := tokens - sinks - self.storage.recent) > 0:
                group.encode(coded)
            else:
                group.recent = _own(group.recent, 0, tokens - sinks)
        return SpectralTokens(group, index)

    def restore(self, tensors: dict[str, Array], positions: np.ndarray, seen: int) -> SpectralTokens:
        """Hold the next layer as `SpectralTokens.tensors` wrote it down."""
        keys = tensors["recent.keys"]
        group, index = self._opened(keys, positions, seen)
        group.first.append((tensors["first.keys"], tensors["first.values"]))
        group.recent.append((keys, tensors["recent.values"]))
        if "codes.packed" in tensors:
            group.codes = Codes(tensors["codes.packed"], tensors["codes.gains"])
        return SpectralTokens(group, index)


@dataclass(frozen=True)
class SpectralStorage:
    """A transform coder over the layers of a group, at a fixed rate: see `spectral_kv.codec`.

    Sinks and recent window stay in the dtype of the cache and are counted. Every token is
    kept. The bases are constants of the model and not counted in a cache's bytes.

    Parameters
    ----------
    bases : str
        File of the model's bases; None is refused when they are read.
    ratio : float, optional
        How many times smaller than in 16 bits the tokens that are stored first become, the exact ones included.
    bits : float, optional
        Instead of `ratio`: bits a number of coded tokens, with everything that goes with them.
    transform : bool
        False leaves channels as they are, every layer on its own: bits by RoPE pair.
    layers : int, optional
        At most so many are coded together, where the bases have larger groups; None for the groups of the bases.
    sinks, recent : int
        First and last kept tokens that stay in the dtype of the cache.
    flush : int
        Tokens fed later are coded in chunks of this many, when they have left the recent window.
    """

    bases: str | None = None
    ratio: float | None = 8.0
    bits: float | None = None
    transform: bool = True
    layers: int | None = None
    sinks: int = 4
    recent: int = 64
    flush: int = 64

    torch_only: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True

    def __post_init__(self):
        if (self.ratio is None) == (self.bits is None):
            raise ValueError(f"ratio={self.ratio} and bits={self.bits}: give one of them and leave the other null")
        if self.ratio is not None and self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be above 1")
        if self.bits is not None and not 0 < self.bits <= 6:
            raise ValueError(f"bits={self.bits} must be above 0 and at most 6")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} can't be negative")
        for name in ("flush", "layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def read(self, shape: tuple[int, int, int], model: str | None = None) -> Bases:
        """The bases of a model of `shape` = (layers, kv_heads, dim); `model` is its hash.

        Raises
        ------
        ValueError
            If there is no file, or it is damaged, or belongs to another model.
        """
        return read(self.bases, shape, model, self.layers, self.transform)

    def token_bytes(self, tokens: int, numbers: int, itemsize: int) -> int:
        """Bytes a coded token may take in all layers, where that many are stored and a token has so many numbers."""
        exact = min(tokens, self.sinks + self.recent)
        if self.bits is not None or tokens == exact:  # what is to come is coded at the ratio itself
            return int((self.bits or 16 / self.ratio) * numbers / 8)
        coded = tokens - exact
        left = numbers * (2 * tokens / self.ratio - itemsize * exact) / coded
        if left < 1:
            raise ValueError(
                f"ratio={self.ratio:g} can't be met: the {exact} exact of {tokens} tokens alone take more; "
                "lower ratio, sinks or recent"
            )
        return int(left)

    def rate(self, tokens: int, shape: tuple[int, int, int], itemsize: int) -> Rate:
        layers, heads, dim = shape
        return rate(self.read(shape), self.token_bytes(tokens, 2 * layers * heads * dim, itemsize))

    def arriving(self, layers: int, rope: Rope) -> Arriving:
        """A sequence of a model of so many layers, which come one by one."""
        return Arriving(self, layers, rope)

    def store_together(
        self, keys: list[Array], values: list[Array], positions: np.ndarray, seen: int, rope: Rope
    ) -> list[SpectralTokens]:
        """Hold rotated keys and values `[batch, kv_heads, tokens, dim]` of all layers.

        Parameters
        ----------
        positions : np.ndarray of int, [tokens]
            Logical positions, the same in every head and layer.
        seen : int
            Logical position of the next token.
        """
        arriving = self.arriving(len(keys), rope)
        return [arriving.add(*pair, positions, seen) for pair in zip(keys, values, strict=True)]

    def nbytes_together(self, tokens: int, layers: int, kv_heads: int, dim: int, itemsize: int) -> int:
        """Bytes that all layers of so many tokens that follow one another take."""
        exact = min(tokens, self.sinks + self.recent)
        numbers = 2 * layers * kv_heads * dim
        held = exact * numbers * itemsize
        if tokens == exact:
            return held
        return held + (tokens - exact) * self.rate(tokens, (layers, kv_heads, dim), itemsize).token_bytes
