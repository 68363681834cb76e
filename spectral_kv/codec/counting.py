"""How often numbers are met, on the device on which they lie."""

from importlib.util import find_spec

import numpy as np
import torch

from spectral_kv.codec.threads import each

PART = 2**18  # numbers that are counted at a time


def on_gpu(x: torch.Tensor) -> bool:
    """Whether Triton's kernels can read a tensor."""
    return x.is_cuda and find_spec("triton") is not None


def counts(numbers: torch.Tensor, size: int) -> np.ndarray:
    """How often each number from 0 to `size` - 1 is among some, int64 `[size]`."""
    if on_gpu(numbers):
        from spectral_kv.codec import ans_kernels

        return ans_kernels.counts(numbers, size)
    parts = numbers.flatten().cpu().split(PART)
    return sum(each(lambda part: torch.bincount(part, minlength=size), parts)).numpy()
