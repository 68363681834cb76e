"""Parts of a cache that do not depend on one another, on all cores: NumPy lets other threads run while it works."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Found = TypeVar("Found")

MOST = 16  # threads


def cores() -> int:
    """How many this process may run on, up to `MOST`."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(own, MOST)


def each(function: Callable[[Part], Found], parts: Iterable[Part]) -> list[Found]:
    """What the function returns of every part, in their order."""
    parts = list(parts)
    if (threads := min(cores(), len(parts))) < 2:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, parts))


class Ahead:
    """A second thread for what is needed later, or the same one where it is not `worth` that or there is one core."""

    def __init__(self, worth: bool = True):
        self._pool = ThreadPoolExecutor(1) if worth and cores() > 1 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._pool:
            self._pool.shutdown()

    def __call__(self, function: Callable[..., Found], *given) -> Callable[[], Found]:
        """What returns the result, once it is there."""
        if self._pool:
            return self._pool.submit(function, *given).result
        return lambda: function(*given)
