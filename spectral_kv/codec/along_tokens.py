"""A cosine transform of components over blocks of tokens, for text whose neighbouring tokens have much in common.

Once RoPE is undone they have little, and it saves a few percent of the bytes: benchmarks/along_tokens.py measures them.
"""

from functools import cache

import numpy as np
from scipy.fft import dct


@cache
def cosine(size: int) -> np.ndarray:
    """The orthonormal transform of a block, float32 `[frequencies, tokens]`."""
    return dct(np.eye(size), axis=0, norm="ortho").astype(np.float32)


def _blockwise(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    size = len(matrix)
    whole = len(x) // size * size
    blocks = (matrix @ x[:whole].reshape(-1, size, x.shape[1])).reshape(whole, x.shape[1])
    return np.concatenate([blocks, x[whole:]])


def forward(components: np.ndarray, size: int) -> np.ndarray:
    """Components `[tokens, components]` with every whole block of `size` tokens transformed."""
    return _blockwise(cosine(size), components)


def backward(transformed: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `forward`, of any run of tokens that begins with a block."""
    return _blockwise(cosine(size).T, transformed)
