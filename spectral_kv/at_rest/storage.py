"""Spectral storage at rest: caches that nobody attends to for a while, in as few bytes as an entropy coder needs."""

from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from spectral_kv.at_rest import along_tokens, exact
from spectral_kv.at_rest.ans import lanes_of
from spectral_kv.at_rest.content import FORMAT, AtRest
from spectral_kv.at_rest.counting import Beside, on_gpu
from spectral_kv.at_rest.entropy import Tables
from spectral_kv.at_rest.rounding import OCTAVE, Components
from spectral_kv.at_rest.step_search import ROUGH, Goal, Search
from spectral_kv.at_rest.variable_rate import VariableRate
from spectral_kv.codec.bases import Bases, Block, by_head, centred
from spectral_kv.engine import coding
from spectral_kv.rope import Rope
from spectral_kv.storage.base import Pair
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.spectral import read
from spectral_kv.storage.windowed import part
from spectral_kv.xp import Array, constant, like, namespace, to_numpy

FINEST = 2 * OCTAVE  # a factor of 4: 16 times the importance
BESIDE = 1500  # bytes of names and sizes, about
LEAST = 0.6  # share of their bytes that exact numbers take at least
CHUNK = 8  # bytes a chunk takes beside its numbers
LANE = 3  # likewise a lane: of the four of its state one is worth its numbers, about


@dataclass(frozen=True)
class SpectralAtRest:
    """A transform coder over groups of layers with an entropy coder, for caches between turns, on disk, on the way.

    What is read from it continues as a cache in the dtype of the one that was written. Sinks and recent window come
    back bit for bit. One of `ratio`, `step` and `distortion` says how much is kept of the others.

    Parameters
    ----------
    bases : str
        File of the model's bases; None is refused when they are read.
    ratio : float, optional
        How many times smaller than in 16 bits a cache becomes, everything that is written included.
    step : float, optional
        Of all components, in the unit of the bases.
    distortion : float, optional
        KL in nats that a prediction is expected to lose, as far as errors are small and the text is like that of the
        bases.
    layers : int, optional
        At most so many are coded together, where the bases have larger groups; None for the groups of the bases.
    sinks, recent : int
        First and last tokens that stay as they are.
    chunk : int
        Tokens that are read at once where only some are wanted.
    along : int, optional
        Tokens of a block of a cosine transform along tokens, which is used for the caches for which it pays; None for
        none of them.
    """

    bases: str | None = None
    ratio: float | None = 16.0
    step: float | None = None
    distortion: float | None = None
    layers: int | None = None
    sinks: int = 4
    recent: int = 64
    chunk: int = 256
    along: int | None = 64

    torch_only: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True
    at_rest: ClassVar[bool] = True
    weighs: ClassVar[bool] = True  # scores of a method say how fine tokens are coded
    importance: ClassVar[np.ndarray | None] = None

    def __post_init__(self):
        given = {"ratio": self.ratio, "step": self.step, "distortion": self.distortion}
        if sum(x is not None for x in given.values()) != 1:
            said = ", ".join(f"{name}={x}" for name, x in given.items())
            raise ValueError(f"{said}: give one of them and leave the others null")
        if self.ratio is not None and self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be above 1")
        for name in ("step", "distortion"):
            if given[name] is not None and given[name] <= 0:
                raise ValueError(f"{name}={given[name]} must be above 0")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} can't be negative")
        for name in ("chunk", "layers", "along"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.along is not None and self.chunk % self.along:
            raise ValueError(f"along={self.along} must divide chunk={self.chunk}: choose another, or None for along")

    def read(self, shape: tuple[int, int, int], model: str | None = None) -> Bases:
        """The bases of a model of `shape` = (layers, kv_heads, dim); `model` is its hash.

        Raises
        ------
        ValueError
            If there is no file, or it is damaged, or belongs to another model.
        """
        return read(self.bases, shape, model, self.layers)

    def weighing(self, importance: np.ndarray) -> "SpectralAtRest":
        """The same with finer steps for tokens that matter: a squared error costs a token's `importance` `[tokens]`.

        Only its proportions count, and no more than 16 times the median or less than a 16th of it (reverse
        water-filling: steps go with the inverse root).

        Raises
        ------
        ValueError
            If it has numbers below 0 or that are none, or nothing above 0.
        """
        own = np.asarray(importance, dtype=np.float64)
        if own.ndim != 1 or not np.isfinite(own).all() or own.min(initial=0) < 0 or not own.any():
            raise ValueError(
                "importance must be one number a token, none below 0 and not all of them 0: take shares of attention"
            )
        found = copy(self)
        object.__setattr__(found, "importance", own)
        return found

    def at(self, bases: str) -> "SpectralAtRest":
        """The same with the bases of a file."""
        found = copy(self)
        object.__setattr__(found, "bases", bases)
        return found

    def _fineness(self, sinks: int, coded: int) -> np.ndarray | None:
        """Logarithms of how much finer than the median tokens are coded, in quarters of a factor of 2."""
        if self.importance is None:
            return None
        own = np.maximum(self.importance[sinks : sinks + coded], 1e-30)
        return np.clip(np.rint(0.5 * OCTAVE * np.log2(own / np.median(own))), -FINEST, FINEST).astype(np.int8)

    def encode(self, keys: list[Array], values: list[Array], positions: np.ndarray, rope: Rope) -> AtRest:
        """Write down rotated keys and values `[kv_heads, tokens, dim]` of all layers.

        Parameters
        ----------
        positions : np.ndarray of int, [tokens]
            Logical positions, the same in every head and layer.

        Raises
        ------
        ValueError
            If a ratio can't be met, or keys or values are not finite.
        """
        keys, values = ([as_torch(x) for x in part] for part in (keys, values))
        heads, tokens, dim = keys[0].shape
        if self.importance is not None and len(self.importance) != tokens:
            raise ValueError(f"importance is that of {len(self.importance)} tokens, and the cache has {tokens}")
        bases = self.read((len(keys), heads, dim))
        sinks = min(self.sinks, tokens)
        coded = max(tokens - sinks - self.recent, 0)
        pairs = list(zip(keys, values, strict=True))
        whole = [part(x, *span) for span in ((0, sinks), (sinks + coded, tokens)) for pair in pairs for x in pair]
        beside, components = Beside(keys[0]), None
        if coded:
            where = np.asarray(positions)[sinks : sinks + coded]
            middle = [[x[..., sinks : sinks + coded, :] for x in pair] for pair in pairs]
            components = components_of(bases.blocks, middle, where, rope)
        with beside():  # a GPU finds components meanwhile
            tensors = {f"exact.{name}": x for name, x in exact.encode(whole).items()}
        header = {
            "format": FORMAT,
            "bases": bases.digest,
            "tokens": tokens,
            "sinks": sinks,
            "coded": coded,
            "chunk": self.chunk,
            "layers": self.layers,
        }
        if not np.array_equal(positions, np.arange(tokens)):
            tensors["positions"] = np.asarray(positions, dtype=np.int32)
        if components is not None:
            if (fineness := self._fineness(sinks, coded)) is not None:
                tensors["fineness"] = fineness
                components.values.mul_(finer(fineness, components.values))
            full = 2 * tokens * 2 * len(keys) * heads * dim
            goal = self._goal(components, full, sum(x.nbytes for x in tensors.values()), bases.following)
            search = Search(components, goal)
            if self.along is not None and coded >= self.along:
                near = search.near(ROUGH)
                if along_tokens.pays(components, self.along, near):
                    transformed = along_tokens.forward(components.values, self.along)
                    search, header["along"] = Search(Components(transformed, components.block), goal, near), self.along
            step = search.step()
            written = VariableRate.of(search.components, step, self.chunk)
            header |= {"step": step, "chunk": self.chunk}
            tensors |= {
                "coded.levels": written.levels, "coded.means": written.means,
                "coded.codes": written.tables.codes, "coded.lengths": written.tables.lengths,
                "coded.words": written.words, "coded.states": written.states,
                "coded.ends": written.ends,
            }  # fmt: skip
            if len(written.far):
                tensors["coded.far"] = written.far
        return AtRest(header, tensors)

    def _goal(self, components: Components, full: int, held: int, following: int) -> Goal:
        """What a cache of `full` bytes in 16 bits shall meet, where `held` bytes are spent already.

        The unit of the bases is the nats that an error costs in `following` predictions together.
        """
        if self.step is not None:
            return Goal(step=float(np.float32(self.step)))
        tokens = components.tokens
        if self.ratio is not None:
            lanes = lanes_of(self.chunk)[0] * (tokens // self.chunk) + min(lanes_of(self.chunk)[0], tokens % self.chunk)
            beside = BESIDE + CHUNK * -(-tokens // self.chunk) + LANE * lanes
            bits = 8 * (full / self.ratio - held - len(components.block) - beside)
            if bits < tokens:
                raise ValueError(
                    f"ratio={self.ratio:g} can't be met: what stays exact and the tables of the codes alone take more; "
                    "lower ratio, sinks or recent"
                )
            return Goal(bits=bits, asked=f"ratio={self.ratio:g}")
        error = self.distortion * following / tokens
        if error > 0.9 * (components.deviations**2).sum():
            raise ValueError(f"distortion={self.distortion:g} is what losing all coded tokens costs: lower it")
        return Goal(error=error)

    def decode(
        self,
        written: AtRest,
        shape: tuple[int, int, int],
        rope: Rope,
        template: Array,
        start: int = 0,
        stop: int | None = None,
    ) -> list[Pair]:
        """Rotated keys and values `[kv_heads, tokens, dim]` of all layers, of tokens `start` to `stop`.

        Of the codes only those of the chunks that the tokens lie in are read.

        Parameters
        ----------
        shape : tuple of int
            (layers, kv_heads, dim) of the model.
        template : array
            What they shall be like: kind of array, device and dtype.

        Raises
        ------
        ValueError
            If the cache was written with other bases.
        """
        layers, heads, dim = shape
        bases = self.read(shape)
        header = written.header
        if header.get("format") != FORMAT:
            raise ValueError("this cache at rest was written by an older version in another format: encode it again")
        if header["bases"] != bases.digest:
            raise ValueError("this cache at rest was written with other bases than these: bring those back")
        tokens, sinks, coded = header["tokens"], header["sinks"], header["coded"]
        stop = tokens if stop is None else stop
        if not 0 <= start < stop <= tokens:
            raise ValueError(f"tokens {start} to {stop} are not among the {tokens} of this cache")
        counts = (sinks, tokens - sinks - coded)
        shapes = [(heads, count, dim) for count in counts for _ in range(2 * layers)]
        beside = as_torch(template)
        aside = Beside(beside)
        low, high = (min(max(x - sinks, 0), coded) for x in (start, stop))
        between = [[] for _ in range(2 * layers)]
        if high > low:
            positions = written.tensors.get("positions", np.arange(tokens))[sinks + low : sinks + high]
            between = [[x] for x in self._middle(written, bases, beside, low, high, positions, rope)]
        with aside():  # a GPU reads the others meanwhile
            whole = exact.decode(written.part("exact"), shapes, beside)
        whole = aside.join(whole)
        first, recent = whole[: 2 * layers], whole[2 * layers :]
        edges = (sinks, sinks + coded, tokens)
        pairs = []
        for index in range(2 * layers):
            parts = []
            if start < sinks:
                parts.append(part(first[index], start, min(stop, sinks)))
            parts += between[index]
            if stop > edges[1]:
                parts.append(part(recent[index], max(start - edges[1], 0), stop - edges[1]))
            pairs.append(as_kind(torch.cat([x.to(beside.dtype) for x in parts], dim=-2), template))
        return list(zip(pairs[::2], pairs[1::2], strict=True))

    def _middle(
        self, written, bases: Bases, beside: torch.Tensor, low: int, high: int, positions: np.ndarray, rope: Rope
    ) -> list[torch.Tensor]:
        """Coded keys and values `low` to `high`, of every layer in turn."""
        header, own = written.header, {"far": np.zeros(0, dtype=np.uint32)} | written.part("coded")
        tables = Tables(own.pop("codes"), own.pop("lengths"))
        coder = VariableRate(header["step"], header["chunk"], tables=tables, **own)
        widths = [block.basis.shape[1] for block in bases.blocks]
        block_of, along = np.repeat(np.arange(len(widths)), widths), header.get("along")
        if along is None:
            components = coder.decode(header["coded"], block_of, low, high, beside)
        else:
            first = low // coder.chunk * coder.chunk
            last = min(-(-high // coder.chunk) * coder.chunk, header["coded"])
            whole = along_tokens.backward(coder.decode(header["coded"], block_of, first, last, beside), along)
            components = whole[:, low - first : high - first]
        if "fineness" in written.tensors:
            components = components / finer(written.tensors["fineness"][low:high], components)
        found, at = [], 0
        for block, width in zip(bases.blocks, widths, strict=True):
            z = components[at : at + width]
            at += width
            if on_gpu(beside) and beside.itemsize == 2:
                x = coding.synthesise(z, block.synthesis, block.mean)
            else:
                x = torch.addmm(constant(block.mean, z), z.T, constant(block.synthesis, z))
            each = by_head(x, bases.dim)  # [heads, tokens, dim], keys of all layers before values
            count = bases.kv_heads
            split = len(block.layers) * count
            keys, values = rope.rotate(each[:split], positions).split(count), each[split:].split(count)
            found += [x for pair in zip(keys, values, strict=True) for x in pair]
        return found

    def store_together(
        self, keys: list[Array], values: list[Array], positions: np.ndarray, seen: int, rope: Rope
    ) -> list[DenseTokens]:
        """What becomes of keys and values `[batch, kv_heads, tokens, dim]`, all rows alike, that were at rest."""
        batch, heads, _, dim = keys[0].shape
        written = self.encode([x[0] for x in keys], [x[0] for x in values], positions, rope)
        pairs = self.decode(written, (len(keys), heads, dim), rope, keys[0][0])
        xp = namespace(keys[0])
        return [DenseTokens(*(xp.concat([x[None]] * batch, axis=0) for x in pair)) for pair in pairs]

    def nbytes_together(self, tokens: int, layers: int, kv_heads: int, dim: int, itemsize: int) -> int:
        """Bytes of a cache that has been read: it lives as it was before.

        Raises
        ------
        ValueError
            If no cache of so many tokens can meet the ratio.
        """
        exact_tokens = min(tokens, self.sinks + self.recent)
        if self.ratio is not None and exact_tokens * itemsize * LEAST > 2 * tokens / self.ratio:
            raise ValueError(
                f"ratio={self.ratio:g} can't be met: the {exact_tokens} exact of {tokens} tokens alone take more; "
                "lower ratio, sinks or recent"
            )
        return 2 * layers * kv_heads * dim * tokens * itemsize


def as_torch(x: Array) -> torch.Tensor:
    """A torch tensor with the numbers of any array, which is read and written as one."""
    return x.detach() if isinstance(x, torch.Tensor) else torch.from_numpy(to_numpy(x))


def as_kind(x: torch.Tensor, template: Array) -> Array:
    """A torch tensor as an array like the template."""
    if isinstance(template, torch.Tensor):
        return x
    return namespace(template).astype(like(x.numpy(), template), template.dtype)


def finer(fineness: np.ndarray, beside: torch.Tensor) -> torch.Tensor:
    """Factors, float32 `[tokens]`, of such logarithms."""
    return torch.from_numpy(2.0 ** (fineness.astype(np.float32) / OCTAVE)).to(beside.device)


def in_halves(keys: list[torch.Tensor], values: list[torch.Tensor]) -> bool:
    """Whether components are found by products of 16-bit numbers, which lose less than the cache has."""
    return on_gpu(keys[0]) and keys[0].itemsize == 2 and coding.suits(keys, values)


def components_of(blocks: tuple[Block, ...], pairs: list[Pair], positions: np.ndarray, rope: Rope) -> Components:
    """Components of rotated keys and values of all layers.

    On a GPU those of 16 bits by a product of such: see `engine/coding.py`.
    """
    widths, waves = [block.basis.shape[1] for block in blocks], rope.undoing(positions)
    found = pairs[0][0].new_empty((sum(widths), len(positions)), dtype=torch.float32)
    for block, own in zip(blocks, found.split(widths), strict=True):
        keys, values = (list(x) for x in zip(*(pairs[layer] for layer in block.layers), strict=True))
        if in_halves(keys, values):
            coding.analyse(block.analysis, block.mean, keys, values, waves, own)
            continue
        x = centred(keys, values, positions, rope, block.mean, wide=True)
        torch.matmul(constant(block.analysis, x).T, x.T, out=own)
    return Components(found, np.repeat(np.arange(len(blocks)), widths))
