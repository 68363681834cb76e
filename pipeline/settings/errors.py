"""Errors that are for the person at the keyboard."""

import difflib
import errno


class InputError(ValueError):
    """Something in the configuration or the files it names can't be used.

    The message says what and what to write instead.
    """


class Exhausted(RuntimeError):
    """The machine ran out of something. The message says of what and what to do."""


class DiskFull(Exhausted):
    """Nothing more can be written, by this run or by any other of the sweep."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: from a scheduler, a shutdown or a person."""


def terminate(signum: int, frame: object) -> None:
    """What to do at SIGTERM."""
    raise Terminated


def exhausted(error: BaseException, outputs: object) -> Exhausted | None:
    """What the machine ran out of, if that is behind an error."""
    link: BaseException | None = error
    while link is not None:
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(link):
            return DiskFull(
                f"the disk of outputs={outputs} is full: free some space, or set outputs=<a folder elsewhere>; "
                "finished runs are kept and the others are measured again"
            )
        torch_says = type(link).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(link)  # GPU, CPU
        if torch_says or isinstance(link, MemoryError):
            return Exhausted(
                "the run ran out of memory: lower document.tokens or prefill_memory_gb, start fewer processes at once, "
                "or choose a smaller model"
            )
        link = link.__cause__ or link.__context__
    return None


def suggestion(word: str, known: list[str]) -> str:
    """`; did you mean x?`, or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else f": choose one of {', '.join(sorted(known))}"
