"""Attention over lengths that don't come again, by kernels that take any length as they are.

On recent GPUs torch prefers cuDNN's attention, which is planned on the host for every shape that is new to it, in tens
of milliseconds: a decoding step, whose length is always new, takes several times what it would, and once more for every
run of KV heads that hold another number of tokens. Its plans are kept for good.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHORT = 512  # new tokens: attention of more is likely to be worth a plan

_lock = threading.Lock()  # torch's choice of kernels is the process's, not a thread's
_inside = 0
_before = True


@contextmanager
def unplanned() -> Iterator[None]:
    """While it lasts, and another thread's as well, torch chooses among the other kernels, if any is allowed."""
    global _inside, _before
    own = torch.backends.cuda
    with _lock:
        if not _inside:
            _before = own.cudnn_sdp_enabled()
            others = own.flash_sdp_enabled() or own.mem_efficient_sdp_enabled() or own.math_sdp_enabled()
            own.enable_cudnn_sdp(_before and not others)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                own.enable_cudnn_sdp(_before)
