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
