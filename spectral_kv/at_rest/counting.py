"""Numbers by parts, and how often they are met, on the device on which they lie."""

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import torch

PART = 2**17  # numbers that are looked at at a time on a CPU
ACCELERATED = 2**25  # likewise on a GPU, whose memory what comes between takes


def some_rows(rows: int, beside: torch.Tensor) -> Iterator[slice]:
    """Slices of so many rows of numbers, each with as many numbers as the last axis of `beside` has."""
    step = max(1, (ACCELERATED if beside.is_cuda else PART) // max(beside.shape[-1], 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def on_gpu(x: torch.Tensor) -> bool:
    """Whether Triton's kernels can read a tensor."""
    return x.is_cuda and find_spec("triton") is not None


class Beside:
    """A stream of a GPU for what does not wait for work that is asked for after this, or nothing at all on a CPU."""

    def __init__(self, x: torch.Tensor):
        self.device = x.device
        self.stream = torch.cuda.Stream(x.device) if x.is_cuda else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(x.device))

    def __call__(self):
        """A context in which it is used."""
        return torch.cuda.stream(self.stream)

    def join(self, found: list[torch.Tensor]) -> list[torch.Tensor]:
        """What was made there, for use here."""
        if self.stream:
            own = torch.cuda.current_stream(self.device)
            own.wait_stream(self.stream)
            for x in found:
                x.record_stream(own)
        return found


def counts(numbers: torch.Tensor, size: int) -> np.ndarray:
    """How often each number from 0 to `size` - 1 is among some, int64 `[size]`."""
    if on_gpu(numbers):
        from spectral_kv.at_rest import ans_kernels

        return ans_kernels.counts(numbers, size)
    parts = numbers.flatten().cpu().split(PART)  # in threads they would wait for those of torch
    return sum(torch.bincount(part, minlength=size) for part in parts).numpy()
