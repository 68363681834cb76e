"""Components of blocks, for several tests."""

import numpy as np
import torch

from spectral_kv.at_rest.rounding import Components


def components(blocks: list[np.ndarray]) -> Components:
    """Of blocks `[tokens, components]`."""
    joined = torch.from_numpy(np.ascontiguousarray(np.concatenate(blocks, axis=1).T))
    return Components(joined, np.repeat(np.arange(len(blocks)), [y.shape[1] for y in blocks]))
