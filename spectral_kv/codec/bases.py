"""Bases of caches: what to subtract, where to turn, and what an error costs, measured once a model.

A block is a group of neighbouring layers. Its columns are the keys before RoPE of all heads and layers, then their
values. Two things are measured for it over calibration text: the covariance of the columns, and their sensitivity, half
the mean square of the gradient of the logarithm of what the model itself predicts later (the Fisher information: the
nats of KL that a small error costs). Channels of one RoPE pair of a head's keys share theirs, as positions mix them,
and so do the channels of a head's values. Columns are multiplied by the root of their sensitivity, so that an error in
one is worth an error in any other, keys or values, in any layer; then the principal components of their covariance are
taken (a Karhunen-Loeve transform under that metric).
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from spectral_kv.rope import Rope
from spectral_kv.xp import Array, blocks, constant, float32, like, namespace, to_numpy

FORMAT = "spectral_kv bases 1"


def columns(keys: list[Array], values: list[Array]) -> Array:
    """Un-rotated keys and values `[..., kv_heads, tokens, dim]` of a block as `[..., tokens, columns]`."""
    xp = namespace(keys[0])
    joined = xp.moveaxis(xp.concat([*keys, *values], axis=-3), -3, -2)
    return xp.reshape(joined, (*joined.shape[:-2], joined.shape[-2] * joined.shape[-1]))


def centred(
    keys: list[Array], values: list[Array], positions: np.ndarray, rope: Rope, mean: np.ndarray, wide: bool = False
) -> Array:
    """Rotated keys and values `[..., kv_heads, tokens, dim]` of a block as float32 `[..., tokens, columns]`.

    Keys are as before RoPE, and the mean `[columns]` is subtracted. With `wide`, keys are in single precision before
    they are turned and not after that, which rounds otherwise.
    """
    xp = namespace(keys[0])
    *before, heads, tokens, dim = keys[0].shape
    if not hasattr(keys[0], "detach") or keys[0].requires_grad or keys[0].dtype == xp.float64:
        turned = [rope.unrotate(float32(k) if wide else k, positions) for k in keys]
        return float32(columns(turned, values)) - constant(mean, keys[0])
    # torch: each is written once, to where it belongs
    heads *= len(keys)
    found = keys[0].new_empty((*before, tokens, 2 * heads, dim), dtype=xp.float32)
    first, second = (xp.moveaxis(x, -3, -2) for x in found.split(heads, dim=-2))
    mean = constant(mean, found).view(2, heads, 1, dim)
    for part in blocks(tokens, 2 * found.nbytes, found[..., :1, :, :]):
        k, v = (xp.concat([x[..., part, :] for x in kind], axis=-3) for kind in (keys, values))
        rope.unrotate(float32(k) if wide else k, positions, part, out=first[..., part, :]).sub_(mean[0])
        xp.subtract(v, mean[1], out=second[..., part, :])
    return found.flatten(-2)


def by_head(x: Array, dim: int) -> Array:
    """Columns `[..., tokens, heads * dim]` as `[..., heads, tokens, dim]`."""
    xp = namespace(x)
    return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], x.shape[-1] // dim, dim)), -2, -3)


@dataclass(frozen=True)
class Block:
    """The basis of a group of layers.

    Parameters
    ----------
    layers : tuple of int
    mean : np.ndarray, [columns]
    weights : np.ndarray, [columns]
        Root of the sensitivity.
    basis : np.ndarray of float16, [columns, components]
        Orthonormal, by descending variance, of weighted columns.
    variances : np.ndarray, [components]
        Of the components, in nats.
    """

    layers: tuple[int, ...]
    mean: np.ndarray
    weights: np.ndarray
    basis: np.ndarray
    variances: np.ndarray

    @cached_property
    def analysis(self) -> np.ndarray:
        """From centred columns to components, float32 `[columns, components]`."""
        return self.weights[:, None] * self.basis.astype(np.float32)

    @cached_property
    def synthesis(self) -> np.ndarray:
        """From components to centred columns, float32 `[components, columns]`."""
        return np.ascontiguousarray((self.basis.astype(np.float32) / self.weights[:, None]).T)

    @property
    def nbytes(self) -> int:
        """Bytes that say the basis; one of channels as they are is said by their order."""
        ordered = np.count_nonzero(self.basis) == self.basis.shape[1]
        basis = 2 * self.basis.shape[1] if ordered else self.basis.nbytes
        return basis + sum(x.nbytes for x in (self.mean, self.weights, self.variances))

    def part(self, layers: tuple[int, ...]) -> "Block":
        """The basis of some of the layers, from what this one knows of their covariance."""
        if layers == self.layers:
            return self
        width = len(self.mean) // (2 * len(self.layers))  # columns of the keys of a layer, and of its values
        first = layers[0] - self.layers[0]
        keys = np.arange(first * width, (first + len(layers)) * width)
        at = np.concatenate([keys, keys + len(self.mean) // 2])
        factor = self.basis[at].astype(np.float64) * np.sqrt(self.variances)
        variances, basis = np.linalg.eigh(factor @ factor.T)
        count = min(len(at), len(self.variances))
        variances = np.maximum(variances[::-1][:count], 1e-12 * variances[-1]).astype(np.float32)
        return Block(layers, self.mean[at], self.weights[at], basis[:, ::-1][:, :count].astype(np.float16), variances)

    def truncated(self, components: int) -> "Block":
        """With the first components alone."""
        return Block(
            self.layers, self.mean, self.weights, np.ascontiguousarray(self.basis[:, :components]),
            self.variances[:components],
        )  # fmt: skip


class Moments:
    """Running sums over the tokens of a block in float64, so that any amount of text fits in memory.

    Parameters
    ----------
    layers : tuple of int
    """

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers
        self.tokens = 0
        self.sum = self.outer = self.squares = 0.0

    def add(self, x: Array, gradients: Array) -> None:
        """Count tokens `[tokens, columns]` and the gradients with respect to them."""
        xp = namespace(x)
        if xp.__name__.startswith("mlx"):  # whose devices know no double precision
            x, gradients = to_numpy(x), to_numpy(gradients)
            xp = np
        x, gradients = xp.astype(x, xp.float64), xp.astype(gradients, xp.float64)
        self.tokens += x.shape[0]
        self.sum = self.sum + xp.sum(x, axis=0)
        self.outer = self.outer + xp.matmul(x.T, x)
        self.squares = self.squares + xp.sum(gradients**2, axis=0)

    def tensors(self) -> dict[str, np.ndarray]:
        """The sums, to be taken up by `resume`."""
        return {name: to_numpy(getattr(self, name)) for name in ("sum", "outer", "squares")}

    def resume(self, tokens: int, tensors: dict[str, np.ndarray], beside: Array) -> None:
        """Go on from sums over `tokens` tokens, on the device of `beside`."""
        self.tokens = tokens
        self.sum, self.outer, self.squares = (like(tensors[name], beside) for name in ("sum", "outer", "squares"))

    def block(self, dim: int) -> Block:
        """The basis that was measured, of heads of `dim` channels."""
        mean = to_numpy(self.sum) / self.tokens
        covariance = to_numpy(self.outer) / self.tokens - np.outer(mean, mean)
        squares = to_numpy(self.squares).reshape(2, -1, dim) / (2 * self.tokens)
        pairs = squares[0].reshape(-1, 2, dim // 2).mean(axis=1, keepdims=True)  # channel f and channel f + dim / 2
        keys = np.broadcast_to(pairs, (len(pairs), 2, dim // 2)).reshape(-1, dim)
        values = np.broadcast_to(squares[1].mean(axis=1, keepdims=True), squares[1].shape)
        sensitivity = np.concatenate([keys, values]).ravel()
        weights = np.sqrt(np.maximum(sensitivity, 1e-6 * sensitivity.max() + 1e-30)).astype(np.float32)
        scale = weights.astype(np.float64)
        variances, basis = np.linalg.eigh(scale[:, None] * covariance * scale)
        variances = np.maximum(variances[::-1], 1e-12 * variances[-1]).astype(np.float32)
        return Block(self.layers, mean.astype(np.float32), weights, basis[:, ::-1].astype(np.float16), variances)


def groups(layers: int, size: int) -> list[tuple[int, ...]]:
    """Neighbouring layers in groups of at most `size`, as equal as can be."""
    count = -(-layers // size)
    return [tuple(int(i) for i in part) for part in np.array_split(np.arange(layers), count)]


@dataclass(frozen=True)
class Bases:
    """Bases of all layers of a model.

    Parameters
    ----------
    blocks : tuple of Block
        In the order of the layers.
    dim : int
        Channels of a head.
    metadata : dict of str
        What they were measured on: model hash, text, tokens.
    """

    blocks: tuple[Block, ...]
    dim: int
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the bases: a constant of the model, which no cache carries."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def following(self) -> int:
        """Predictions that the sensitivity adds up."""
        return int(self.metadata.get("following", 512))

    @property
    def layers(self) -> int:
        return sum(len(block.layers) for block in self.blocks)

    @property
    def kv_heads(self) -> int:
        block = self.blocks[0]
        return len(block.mean) // (2 * len(block.layers) * self.dim)

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for x in (block.mean, block.weights, block.basis, block.variances):
                digest.update(np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def truncated(self, components: float) -> "Bases":
        """With the given share of the components of all blocks, those of the largest variances."""
        pooled = np.sort(np.concatenate([block.variances for block in self.blocks]))[::-1]
        least = pooled[min(max(round(components * len(pooled)), 1), len(pooled)) - 1]
        kept = [max(8, -(-int((block.variances >= least).sum()) // 8) * 8) for block in self.blocks]
        return Bases(tuple(b.truncated(k) for b, k in zip(self.blocks, kept, strict=True)), self.dim, self.metadata)

    def channels(self) -> "Bases":
        """Without a transform, every layer on its own: components are channels, those of a RoPE pair of a variance.

        Bits then go to pairs as in Block-GTQ (arXiv 2606.24033), whose weights are the energies of queries and keys;
        here they are what an error costs.
        """
        found = []
        for block in self.regrouped(1).blocks:
            variances = (block.basis.astype(np.float64) ** 2) @ block.variances
            keys, values = variances.reshape(2, -1, self.dim)
            pairs = keys.reshape(-1, 2, self.dim // 2).mean(axis=1, keepdims=True)
            pairs = np.broadcast_to(pairs, (len(pairs), 2, self.dim // 2)).reshape(keys.shape)
            means = np.concatenate([pairs, values]).ravel()
            order = np.argsort(-means, kind="stable")
            basis = np.eye(len(means), dtype=np.float16)[:, order]
            found.append(Block(block.layers, block.mean, block.weights, basis, means[order].astype(np.float32)))
        return Bases(tuple(found), self.dim, self.metadata)

    def regrouped(self, layers: int) -> "Bases":
        """In smaller groups, of at most `layers` layers, whose bases follow from the covariances within these.

        Raises
        ------
        ValueError
            If the groups of these bases are smaller, or are cut at other layers.
        """
        wanted, blocks = groups(self.layers, layers), []
        for block in self.blocks:
            inside = [group for group in wanted if set(group) <= set(block.layers)]
            blocks += [block.part(group) for group in inside]
        if [block.layers for block in blocks] != wanted:
            sizes = ", ".join(str(len(block.layers)) for block in self.blocks)
            raise ValueError(
                f"layers={layers}: these bases have groups of {sizes} layers, which can't be cut into such: "
                "measure bases with as many"
            )
        return Bases(tuple(blocks), self.dim, self.metadata)

    def save(self, path: str | Path) -> None:
        from safetensors.numpy import save_file

        tensors = {}
        for index, block in enumerate(self.blocks):
            for name in ("mean", "weights", "basis", "variances"):
                tensors[f"{index}.{name}"] = np.ascontiguousarray(getattr(block, name))
        layout = {
            "format": FORMAT,
            "dim": str(self.dim),
            "groups": " ".join(str(len(block.layers)) for block in self.blocks),
            "digest": self.digest,
        }
        save_file(tensors, str(path), self.metadata | layout)

    @classmethod
    def load(cls, path: str | Path, shape: tuple[int, int, int], model: str | None = None) -> "Bases":
        """Read the bases of a model of `shape` = (layers, kv_heads, dim).

        Parameters
        ----------
        model : str, optional
            Hash of the model; bases that were measured on another are refused.

        Raises
        ------
        ValueError
            If the file holds something else, is damaged, or belongs to another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError("another format")
                stops = np.cumsum([int(n) for n in metadata["groups"].split()])
                blocks = tuple(
                    Block(
                        tuple(range(start, stop)),
                        *(file.get_tensor(f"{i}.{name}") for name in ("mean", "weights", "basis", "variances")),
                    )
                    for i, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True))
                )
            bases = cls(blocks, int(metadata["dim"]), metadata)
            found = (bases.layers, bases.kv_heads, bases.dim)
        except (SafetensorError, OSError, KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"{path} does not hold bases of caches ({error}): calibrate the model") from None
        if found != shape:
            raise ValueError(
                f"{path} was calibrated for [layers, kv heads, dim] = {list(found)}, this model has {list(shape)}: "
                "calibrate this model"
            )
        if model is not None and metadata.get("model", model) != model:
            raise ValueError(f"{path} was calibrated on another model ({metadata['model'][:12]}): calibrate this model")
        if metadata.get("digest") != bases.digest:
            raise ValueError(
                f"{path} is damaged, its numbers are not those that were written: calibrate the model again"
            )
        return bases
