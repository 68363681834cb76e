"""Text files on this machine."""

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.documents.base import Documents
from pipeline.settings.errors import InputError


@dataclass(frozen=True)
class File(Documents):
    """Windows of UTF-8 text files.

    Parameters
    ----------
    path : str
        A file, or a glob such as `papers/**/*.txt`.
    """

    path: str | None = None

    source: ClassVar[str] = "the text in document.path"

    def files(self) -> list[Path]:
        if not self.path:
            raise InputError("document=file needs document.path=<a file or a quoted glob>")
        found = sorted(
            Path(p) for p in glob.glob(str(Path(self.path).expanduser()), recursive=True) if Path(p).is_file()
        )
        if not found:
            raise InputError(
                f"document.path={self.path} names no file: check the path (relative to the current folder), quote globs"
            )
        return found

    def check(self) -> None:
        super().check()
        self.files()

    def texts(self) -> list[str]:
        texts = []
        for file in self.files():
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError) as error:
                raise InputError(f"document.path: {file} can't be read as UTF-8 text ({error})") from None
        return texts

    def made_of(self) -> frozenset[str]:
        return frozenset(f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for file in self.files())
