"""How often numbers are met, on the device on which they lie."""

import numpy as np
import torch

from spectral_kv.codec.threads import each

PART = 2**18  # numbers that are counted at a time


def counts(numbers: torch.Tensor, size: int) -> np.ndarray:
    """How often each number from 0 to `size` - 1 is among some, int64 `[size]`."""
    if numbers.is_cuda:
        from spectral_kv.codec import ans_kernels

        return ans_kernels.counts(numbers, size)
    parts = numbers.flatten().split(PART)
    return sum(each(lambda part: torch.bincount(part, minlength=size), parts)).numpy()
