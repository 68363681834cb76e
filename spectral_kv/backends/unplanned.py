"""Attention over lengths that don't come again, by kernels that take any length as they are.

On recent GPUs torch prefers cuDNN's attention, which is planned on the host for every shape that is new to it, in tens
of milliseconds: a decoding step, whose length is always new, takes several times what it would, and once more for every
run of KV heads that hold another number of tokens. Its plans are kept for good.
"""

import os
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
    """While it lasts, and another thread's as well, torch chooses among the other kernels, if any is allowed.

    A caller's own change of cuDNN's attention within is undone on leaving.
    """
    global _inside, _before
    own = torch.backends.cuda
    lock = _lock
    with lock:
        first = not _inside
        if first:
            _before = own.cudnn_sdp_enabled()
            others = own.flash_sdp_enabled() or own.mem_efficient_sdp_enabled() or own.math_sdp_enabled()
        _inside += 1  # first, so that a fork in between gives it back
        if first:
            own.enable_cudnn_sdp(_before and not others)
    try:
        yield
    finally:
        if lock is _lock:  # else it was given back in a fork
            with lock:
                if _inside == 1:
                    own.enable_cudnn_sdp(_before)
                _inside -= 1


def _forked() -> None:
    """In the child of a fork no other thread is left to leave, or to open the lock."""
    global _lock, _inside
    if _inside:
        torch.backends.cuda.enable_cudnn_sdp(_before)
    _lock, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)
