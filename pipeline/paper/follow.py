"""Processes that end with the one that started them, however it ended; and one that ends before it should."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager

from pipeline.settings.errors import Exhausted

PATIENCE = 2  # seconds that a run has to be closed in


def _outlived() -> None:
    multiprocessing.parent_process().join()
    while True:  # the first one ends a run, which is then killed and not unfinished; the next one ends the process
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)


def follow() -> None:
    """Have this process terminated once its parent is no more.

    A worker of a pool waits for ever for work from a process that was killed, with a model in memory.
    """
    threading.Thread(target=_outlived, daemon=True).start()


@contextmanager
def outliving(processes: int) -> Iterator[None]:
    """Say in a sentence that one of several processes was killed: its pool knows no more than that it is gone.

    Raises
    ------
    Exhausted
    """
    try:
        yield
    except BrokenExecutor:
        raise Exhausted(
            f"one of the {processes} processes that share the work was killed, as a system does that runs out of "
            "memory: give fewer --processes, or lower prefill_memory_gb; finished runs are kept, and the same command "
            "goes on after them"
        ) from None
