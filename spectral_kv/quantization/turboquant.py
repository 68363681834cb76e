"""TurboQuant (arXiv 2504.19874), the variant that minimises squared error: rotate, quantise, store one scalar.

A random rotation makes every channel of a vector nearly Gaussian, so one fixed Lloyd-Max codebook serves all. The
scalar kept beside the codes folds the norm and a correction of the shrinkage that plain rounding to centroids brings.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import pack, planes
from spectral_kv.quantization.rotation import ROTATIONS, rounded
from spectral_kv.xp import Array, constant, float32, namespace, picked, rows

BITS = (1, 2, 3, 4)  # a channel: codes that a table over bytes decodes
CORRECTIONS = ("plain", "renorm", "unbiased")


@cache
def centroid_table(bits: int) -> np.ndarray:
    """Centroids of the codes that one look-up decodes, `[entries, codes]`.

    Those in a byte; at 3 bits those whose low bits are in one, with their 4 high bits above it.
    """
    stored = np.arange(256 if bits != 3 else 4096)[:, None]
    if bits != 3:
        return codebook(bits)[0][stored >> bits * np.arange(8 // bits) & 2**bits - 1]
    part = np.arange(4)
    return codebook(3)[0][stored >> 2 * part & 3 | (stored >> 8 + part & 1) << 2]


@cache
def alternate_bits() -> np.ndarray:
    """Bits 0, 2, 4, 6 of every byte, and bits 1, 3, 5, 7, each as bits 8 to 11, int32 `[256, 2]`."""
    byte, part = np.arange(256)[:, None, None], np.arange(4)
    return ((byte >> 2 * part + np.arange(2)[:, None] & 1) << 8 + part).sum(axis=-1).astype(np.int32)


def table_index(codes: Array, bits: int) -> tuple[np.ndarray, Array]:
    """A table of centroids, and what to look up in it for packed codes `[..., bytes]`.

    Entry i of the last axis has the channels i, i + n, i + 2n, ..., n being its length: one look-up for what shifts and
    masks do in many steps.
    """
    xp = namespace(codes)
    if bits != 3:
        return centroid_table(bits), xp.astype(codes, xp.int32)
    low, high = planes(codes)  # channel i + k n has its high bit in byte i mod n/2, at 2k or, where i >= n/2, at 2k + 1
    pairs = picked(constant(alternate_bits(), codes), xp.reshape(xp.astype(high, xp.int32), (-1,)), 0)
    pairs = xp.reshape(pairs, (*high.shape, 2))
    return centroid_table(3), xp.astype(low, xp.int32) + xp.concat([pairs[..., 0], pairs[..., 1]], axis=-1)


@cache
def back_rotation(rotation: str, dim: int, seed: tuple[int, ...], parts: int) -> np.ndarray:
    """The rotation by which decoded channels are multiplied, its rows in the order in which the table gives them."""
    matrix = ROTATIONS[rotation](dim, seed)
    return np.ascontiguousarray(matrix.reshape(parts, -1, dim).swapaxes(0, 1).reshape(dim, dim))


@dataclass(frozen=True)
class PackedVectors:
    """Quantised vectors.

    `codes` uint8 `[..., tokens, dim * bits / 8]`, `scale` float16 `[..., tokens]`, `mean` float16 `[..., 1, dim]` or
    None.
    """

    codes: Array
    scale: Array
    mean: Array | None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.mean is None else self.mean.nbytes)

    def take(self, indices: Array) -> "PackedVectors":
        """The tokens `[..., heads, kept]` alone, every head its own; the mean stays."""
        scale = namespace(self.scale).take_along_axis(self.scale, indices, axis=-1)
        return PackedVectors(rows(self.codes, indices), scale, self.mean)

    def where(self, here: Array, other: "PackedVectors") -> "PackedVectors":
        """The tokens of `other` where `here` `[..., heads, tokens]` says so; the mean stays."""
        xp = namespace(self.codes)
        codes = xp.where(here[..., None], other.codes, self.codes)
        return PackedVectors(codes, xp.where(here, other.scale, self.scale), self.mean)

    def append(self, other: "PackedVectors") -> "PackedVectors":
        """With the tokens of `other`, encoded with the same mean, at the end.

        Means that are one array are not compared: that would make an accelerator wait at every flush.

        Raises
        ------
        ValueError
            If the means differ.
        """
        xp = namespace(self.codes)
        ours, theirs = self.mean, other.mean
        if ours is not theirs and (ours is None or theirs is None or not bool(xp.all(ours == theirs))):
            raise ValueError("packed tokens have different means: encode later tokens with mean=first.mean")
        codes = xp.concat([self.codes, other.codes], axis=-2)
        return PackedVectors(codes, xp.concat([self.scale, other.scale], axis=-1), self.mean)


@dataclass(frozen=True)
class TurboQuant:
    """Encoder and decoder for vectors of one kind (keys, or values) of one layer.

    Parameters
    ----------
    bits : int
        1 to 4.
    seed : tuple of int
        Of the rotation.
    correction : str
        `plain` stores the norm as the paper does, and vectors shrink; `renorm` keeps their norm (for keys),
        `unbiased` their inner product with themselves (for values).
    center : bool
        Subtract the mean over tokens of each head and channel first. Attention does not see a shift common to all keys.
    rotation : str
        `haar`, or `hadamard` for a power of two channels.
    """

    bits: int
    seed: tuple[int, ...]
    correction: str
    center: bool
    rotation: str = "haar"

    def __post_init__(self):
        for name, known in {"bits": BITS, "correction": CORRECTIONS, "rotation": ROTATIONS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is not known: choose {', '.join(map(str, known))}")

    def _rotate(self, unit: Array) -> Array:
        """Unit vectors, rotated, to about three digits but without any rounding of the sums.

        Products of multiples of 2^-11 and 2^-12 add up exactly in float32 while sums stay below 2, as those of unit
        vectors do. So codes depend neither on the order of summation, nor on how many tokens are encoded together.
        Rounding adds 3e-6 to the relative squared error.
        """
        xp = namespace(unit)
        matrix = constant(rounded(self.rotation, unit.shape[-1], self.seed), unit)
        return xp.matmul(xp.round(unit * 2**11) / 2**11, matrix)

    def _centroids(self, codes: Array) -> Array:
        xp = namespace(codes)
        flat = xp.reshape(xp.astype(codes, xp.int64), (-1,))
        return xp.reshape(picked(constant(codebook(self.bits)[0], codes), flat, 0), codes.shape)

    def encode(self, x: Array, mean: Array | None = None) -> PackedVectors:
        """Pack `[..., heads, tokens, dim]`; a zero vector comes back as the mean (zero without centring).

        Parameters
        ----------
        x : array, [..., heads, tokens, dim]
        mean : array, [..., heads, 1, dim], optional
            With `center`, the mean of tokens packed before; measured on `x` if not given. Tokens packed in pieces with
            one mean have the codes of tokens packed at once.

        Raises
        ------
        ValueError
            If a mean is given without `center`, or there is no token to measure it on.
        """
        xp = namespace(x)
        dim = x.shape[-1]
        y = float32(x)
        if mean is not None and not self.center:
            raise ValueError("encode got a mean, but center=False: leave it out or set center=True")
        if self.center:
            if mean is None and x.shape[-2] == 0:
                raise ValueError("center=True needs a token to measure the mean on, not 0: give mean")
            mean = xp.mean(y, axis=-2, keepdims=True) if mean is None else mean
            if mean.dtype != xp.float16:  # one that is half already stays the same array
                mean = xp.astype(mean, xp.float16)
            y = y - float32(mean)
        norm = xp.sqrt(xp.sum(y**2, axis=-1, keepdims=True))
        y = self._rotate(y / xp.clip(norm, 1e-12, None)) * dim**0.5
        codes = sum(xp.astype(y > float(t), xp.uint8) for t in codebook(self.bits)[1])
        y_hat = self._centroids(codes)
        dot = xp.sum(y * y_hat, axis=-1, keepdims=True)
        factor = {  # the squared norm of y is dim
            "plain": lambda: 1.0,
            "renorm": lambda: xp.sqrt(dim / xp.sum(y_hat * y_hat, axis=-1, keepdims=True)),
            "unbiased": lambda: dim / xp.where(dot > 0, dot, xp.ones_like(dot)),
        }[self.correction]()
        scale = xp.astype((norm * factor / dim**0.5)[..., 0], xp.float16)
        return PackedVectors(pack(codes, self.bits), scale, mean)

    def decode(self, packed: PackedVectors) -> Array:
        """The float32 vectors `[..., heads, tokens, dim]` that the codes stand for."""
        xp = namespace(packed.codes)
        table, index = table_index(packed.codes, self.bits)
        values = picked(constant(table, index), xp.reshape(index, (-1,)), 0)
        y = xp.reshape(values, (*packed.codes.shape[:-1], index.shape[-1] * values.shape[-1]))  # also of no tokens
        back = constant(back_rotation(self.rotation, y.shape[-1], self.seed, table.shape[1]), y)
        x = xp.matmul(y * float32(packed.scale)[..., None], back)
        return x if packed.mean is None else x + float32(packed.mean)
