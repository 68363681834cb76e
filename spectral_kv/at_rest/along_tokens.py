"""A cosine transform of components over blocks of tokens, for text whose neighbouring tokens have much in common.

Once RoPE is undone they have little, and it saves a few percent of the bytes: benchmarks/along_tokens.py measures them.
"""

from functools import cache

import numpy as np
import torch
from scipy.fft import dct

from spectral_kv.at_rest.rounding import Components
from spectral_kv.at_rest.step_search import few

SAMPLED = 4  # every so many components say whether the transform pays


@cache
def cosine(size: int) -> np.ndarray:
    """The orthonormal transform of a block, float32 `[frequencies, tokens]`."""
    return dct(np.eye(size), axis=0, norm="ortho").astype(np.float32)


def _blockwise(matrix: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    size, found = len(matrix), torch.empty_like(x)
    whole, turned = x.shape[1] // size * size, torch.from_numpy(matrix.T.copy()).to(x.device)
    own = [y[:, :whole].unflatten(1, (whole // size, size)) for y in (x, found)]  # neither is copied
    torch.bmm(own[0], turned.expand(len(x), size, size), out=own[1])
    found[:, whole:] = x[:, whole:]
    return found


def forward(components: torch.Tensor, size: int) -> torch.Tensor:
    """Components `[components, tokens]` with every whole block of `size` tokens transformed."""
    return _blockwise(cosine(size), components)


def backward(transformed: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `forward`, of any run of tokens that begins with a block."""
    return _blockwise(cosine(size).T, transformed)


def pays(components: Components, size: int, step: float) -> bool:
    """Whether components cost less when they are transformed, as some of them and some tokens say."""
    block = np.unique(components.block[::SAMPLED], return_inverse=True)[1]
    plain = components.values[::SAMPLED].contiguous()
    before, after = (few(Components(x, block)).cost(step) for x in (plain, forward(plain, size)))
    return after < before
