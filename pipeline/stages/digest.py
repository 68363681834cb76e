"""SHA-256 of files, read once as long as they stay as they are: the jobs of a sweep name the same ones."""

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=64)
def _digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged(path: Path) -> tuple[Path, int, int]:
    """A file with what tells that it was not written again: time in ns, and bytes."""
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return _digest(*unchanged(path))
