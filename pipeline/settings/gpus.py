"""One process a GPU on one machine: which there are, and which of them a process has."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.settings.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
LAUNCHER = "local_gpus"

_taken: FileLock | None = None  # held until the process ends


def visible() -> list[str]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` writes them."""
    if (given := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def offer() -> None:
    """Name the GPUs in the environment of the processes that are to come.

    Raises
    ------
    InputError
        If there is none.
    """
    if not (names := visible()):
        raise InputError(
            f"hydra/launcher={LAUNCHER} finds no GPU: choose hydra/launcher=local_joblib hydra.launcher.n_jobs=2"
        )
    os.environ[VISIBLE] = ",".join(names)


def take(outputs: Path) -> None:
    """Take one GPU that no other process of the sweep has, and hide the others; a process keeps the one it has.

    Must be called before CUDA is used, which reads the variable once.

    Raises
    ------
    InputError
        If all are taken.
    """
    global _taken
    if _taken is not None:
        return
    folder = outputs / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    names = visible()
    for name in names:
        lock = FileLock(folder / f"gpu-{name.replace('/', '_')}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _taken, os.environ[VISIBLE] = lock, name
        return
    raise InputError(
        f"hydra/launcher={LAUNCHER}: other processes have all of the GPUs {', '.join(names)}: "
        f"set hydra.launcher.n_jobs to at most {len(names)}, and run one such sweep at a time"
    )
