"""Processes that end with the one that started them, however it ended."""

import multiprocessing
import os
import signal
import threading
import time

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
