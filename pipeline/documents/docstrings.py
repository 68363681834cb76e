"""Docstrings of the standard library: calibration text that every Python has, without the language reference."""

import ast
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from pipeline.documents.base import Documents
from pipeline.documents.overlap import shingles
from pipeline.documents.pydoc import topics_text

LEFT_OUT = {"pydoc_data", "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@cache
def docstrings_text() -> str:
    """All docstrings of at least 100 characters, in the order of the files, without what the language reference has."""
    root = Path(sysconfig.get_path("stdlib"))
    evaluation = shingles(topics_text())
    found = []
    for file in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            nodes = (
                n
                for n in ast.walk(tree)
                if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            )
            found += [doc for n in nodes if (doc := ast.get_docstring(n)) and len(doc) >= 100]
    return "\n\n".join(doc for doc in found if evaluation.isdisjoint(shingles(doc)))


@dataclass(frozen=True)
class Docstrings(Documents):
    """Windows of all docstrings of at least 100 characters, in the order of the files.

    Those that share ten words in a row with the language reference are left out: it contains the manual of pdb, and so
    does the module.
    """

    source: ClassVar[str] = "the standard library's docstrings"

    def texts(self) -> list[str]:
        return [docstrings_text()]
