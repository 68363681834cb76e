"""Codes of fixed rate, which attention can read at any token: classes of equal bits, each a rotation and a scale.

Components with the same number of bits form a class. A token's components of a class are divided by their root mean
square, kept in 8 bits as a logarithm; a random rotation makes what is left nearly Gaussian, and one Lloyd-Max codebook
codes it: TurboQuant inside each class. The scale of its own is what lets a class follow tokens that are far from the
calibration's. Rotations are part of the matrices that go to components and back and cost nothing.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from spectral_kv.codec.bases import Block
from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import pack, unpack
from spectral_kv.quantization.rotation import haar
from spectral_kv.xp import Array, blocks, constant, float32, namespace, picked

GAIN_BITS = 8  # of a token's scale of a class
OCTAVE = 16  # steps of a scale a factor of 2: its rounding adds 1.6e-4 to the relative squared error
ZERO = 128  # code of a scale of 1
CELLS = (
    128  # cells a standard deviation of the table that finds a code; rounding thresholds to it costs nothing visible
)
RANGE = 6  # standard deviations


@cache
def cells(bits: int) -> np.ndarray:
    """Codes, uint8, of the middles of the cells between -`RANGE` and `RANGE` standard deviations."""
    middles = (np.arange(2 * RANGE * CELLS) + 0.5) / CELLS - RANGE
    return np.searchsorted(codebook(bits)[1], middles.astype(np.float32)).astype(np.uint8)


@dataclass(frozen=True)
class Codes:
    """Coded tokens of one block: `packed` uint8 `[..., tokens, bytes]`, `gains` uint8 `[..., tokens, classes]`."""

    packed: Array
    gains: Array

    @property
    def tokens(self) -> int:
        return self.packed.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.gains.nbytes

    def take(self, tokens: Array) -> "Codes":
        """The tokens `[kept]` alone."""
        xp = namespace(self.packed)
        return Codes(xp.take(self.packed, tokens, axis=-2), xp.take(self.gains, tokens, axis=-2))

    def append(self, other: "Codes") -> "Codes":
        xp = namespace(self.packed)
        return Codes(xp.concat([self.packed, other.packed], axis=-2), xp.concat([self.gains, other.gains], axis=-2))


@dataclass(frozen=True)
class Class:
    """Components `start` to `stop` of a block, `bits` each."""

    bits: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.bits // 8


def classes(bits: np.ndarray) -> list[Class]:
    """Classes of bits `[components]`, descending; components without bits are in none."""
    found = []
    for number in sorted(set(bits.tolist()) - {0}, reverse=True):
        at = np.flatnonzero(bits == number)
        found.append(Class(number, int(at[0]), int(at[-1]) + 1))
    return found


class FixedRate:
    """Encoder and decoder of one block at one allocation.

    Parameters
    ----------
    block : Block
        The basis of its layers.
    bits : np.ndarray of int, [components]
        Descending, every number of bits a multiple of eight times.
    """

    def __init__(self, block: Block, bits: np.ndarray):
        self.classes = classes(bits)
        self.mean = block.mean
        analysis, synthesis = block.analysis, block.synthesis
        used = self.classes[-1].stop if self.classes else 0
        self.analysis = np.zeros((len(block.mean), used), dtype=np.float32)
        self.synthesis = np.zeros((used, len(block.mean)), dtype=np.float32)
        deviations = np.sqrt(block.variances)
        for c in self.classes:
            part = slice(c.start, c.stop)
            rotation = haar(c.stop - c.start, (c.stop - c.start, c.bits))
            self.analysis[:, part] = analysis[:, part] / deviations[part] @ rotation.T
            self.synthesis[part] = rotation @ (deviations[part, None] * synthesis[part])
        self.class_of = np.repeat(np.arange(len(self.classes)), [c.stop - c.start for c in self.classes])
        self.table_of = (self.class_of * (2 * RANGE * CELLS)).astype(np.int32)
        self.tables = np.concatenate([np.zeros(0, dtype=np.uint8), *(cells(c.bits) for c in self.classes)])

    @property
    def token_bytes(self) -> int:
        """Bytes that a coded token takes."""
        return sum(c.nbytes for c in self.classes) + len(self.classes) * GAIN_BITS // 8

    def encode(self, x: Array) -> Codes:
        """Code tokens `[..., tokens, columns]`, every token on its own."""
        return self.encode_centred(float32(x) - constant(self.mean, x))

    def encode_centred(self, x: Array) -> Codes:
        """`encode`, of float32 tokens of which the mean is subtracted already."""
        xp = namespace(x)
        y = xp.matmul(x, constant(self.analysis, x))
        parts = [self._codes(y[..., part, :]) for part in blocks(y.shape[-2], 5 * y.nbytes, y[..., :1, :])]
        packed, gains = zip(*parts, strict=True)
        return Codes(xp.concat(packed, axis=-2), xp.concat(gains, axis=-2)) if len(parts) > 1 else Codes(*parts[0])

    def _codes(self, y: Array) -> tuple[Array, Array]:
        """Packed codes and scales of rotated components `[..., tokens, used]`, which are overwritten.

        On a GPU every step costs its launch, so that most are taken for all classes at once.
        """
        xp = namespace(y)
        squares = y**2
        powers = [xp.mean(squares[..., c.start : c.stop], axis=-1, keepdims=True) for c in self.classes]
        gain = xp.round(0.5 * OCTAVE * xp.log2(xp.clip(xp.concat(powers, axis=-1), 1e-30, None))) + ZERO
        gain = xp.clip(gain, 0, 255)
        cell = 2.0 ** ((gain - ZERO) / OCTAVE) / CELLS  # a power of two, which changes no rounding
        y /= picked(cell, constant(self.class_of, y), -1)
        y += RANGE * CELLS
        at = xp.astype(xp.clip(y, 0, 2 * RANGE * CELLS - 1), xp.int32)  # which rounds towards 0
        at += constant(self.table_of, y)
        codes = xp.reshape(picked(constant(self.tables, y), xp.reshape(at, (-1,)), 0), at.shape)
        packed = [pack(codes[..., c.start : c.stop], c.bits) for c in self.classes]
        return xp.concat(packed, axis=-1), xp.astype(gain, xp.uint8)

    def components(self, codes: Codes) -> Array:
        """Rotated components `[..., tokens, used]` that the codes stand for."""
        xp = namespace(codes.packed)
        parts, at = [], 0
        for index, c in enumerate(self.classes):
            numbers = unpack(codes.packed[..., at : at + c.nbytes], c.bits)
            at += c.nbytes
            flat = xp.reshape(xp.astype(numbers, xp.int64), (-1,))
            centroids = xp.reshape(xp.take(constant(codebook(c.bits)[0], numbers), flat, axis=0), numbers.shape)
            gain = 2.0 ** ((float32(codes.gains[..., index : index + 1]) - ZERO) / OCTAVE)
            parts.append(centroids * gain)
        return xp.concat(parts, axis=-1)

    def decode(self, codes: Codes) -> Array:
        """The float32 tokens `[..., tokens, columns]` that the codes stand for."""
        return self.restore(self.components(codes), 0, len(self.mean))

    def restore(self, components: Array, start: int, stop: int) -> Array:
        """Columns `start` to `stop` `[..., tokens, stop - start]` of tokens with such components."""
        xp = namespace(components)
        synthesis, mean = constant(self.synthesis, components), constant(self.mean, components)
        return xp.matmul(components, synthesis[:, start:stop]) + mean[start:stop]
