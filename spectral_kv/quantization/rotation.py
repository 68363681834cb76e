"""Random rotations, drawn in NumPy so that every kind of array and device gets the same bits for the same seed."""

from functools import cache

import numpy as np
from scipy.linalg import hadamard as sylvester


def _generator(seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@cache  # every layer needs its two at every step
def haar(dim: int, seed: tuple[int, ...]) -> np.ndarray:
    """A Haar-distributed orthogonal matrix, float32 `[dim, dim]`.

    Q of a Gaussian matrix, its columns signed by the diagonal of R.
    """
    q, r = np.linalg.qr(_generator(seed).normal(size=(dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@cache
def hadamard(dim: int, seed: tuple[int, ...]) -> np.ndarray:
    """A Hadamard matrix whose columns have random signs, divided by `sqrt(dim)`, float32 `[dim, dim]`.

    As good as Haar on dense vectors. A vector with a single large channel stays far from Gaussian: all its rotated
    channels are equally large, and 2 bits lose 2.2 times as much.

    Raises
    ------
    ValueError
        If `dim` is not a power of two.
    """
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"rotation=hadamard takes a power of two channels, not {dim}: choose rotation=haar")
    signs = 2 * _generator(seed).integers(0, 2, size=dim) - 1
    return (sylvester(dim) * signs / dim**0.5).astype(np.float32)


ROTATIONS = {"haar": haar, "hadamard": hadamard}


@cache
def rounded(rotation: str, dim: int, seed: tuple[int, ...]) -> np.ndarray:
    """The transposed matrix of a rotation in multiples of 2^-12, with which products can be exact in float32."""
    return np.ascontiguousarray(np.round(ROTATIONS[rotation](dim, seed).T * 2**12) / 2**12)
