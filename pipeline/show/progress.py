"""A progress bar over documents, on a terminal only."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def progress(items: Sequence[T], label: str, logged: bool = False) -> Iterator[T]:
    """Yield the items while a bar with the label moves on standard error.

    Where that is no terminal there is no bar; `logged` writes a line after every item instead.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for done, item in enumerate(bar.track(items, description=label), 1):
            yield item
            if logged and not console.is_terminal:
                print(
                    f"{label}: {done} of {len(items)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
                )
