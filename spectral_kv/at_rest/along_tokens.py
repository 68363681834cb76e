"""A cosine transform of components over blocks of tokens, for text whose neighbouring tokens have much in common.

Once RoPE is undone they have little, and it saves a few percent of the bytes: benchmarks/along_tokens.py measures them.
"""

from functools import cache

import numpy as np
import torch
from scipy.fft import dct

from spectral_kv.at_rest.counting import some_rows


@cache
def cosine(size: int) -> np.ndarray:
    """The orthonormal transform of a block, float32 `[frequencies, tokens]`."""
    return dct(np.eye(size), axis=0, norm="ortho").astype(np.float32)


def _blockwise(matrix: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    size, found = len(matrix), torch.empty_like(x)
    whole, turned = x.shape[1] // size * size, torch.from_numpy(matrix.T.copy()).to(x.device)
    for rows in some_rows(len(x), x):
        found[rows, :whole] = (x[rows, :whole].reshape(-1, size) @ turned).view(rows.stop - rows.start, whole)
    found[:, whole:] = x[:, whole:]
    return found


def forward(components: torch.Tensor, size: int) -> torch.Tensor:
    """Components `[components, tokens]` with every whole block of `size` tokens transformed."""
    return _blockwise(cosine(size), components)


def backward(transformed: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `forward`, of any run of tokens that begins with a block."""
    return _blockwise(cosine(size).T, transformed)
