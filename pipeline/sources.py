"""Which source files a run depends on: what its classes and the runner import, and all of a user's own package."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from pipeline.settings.folders import PACKAGE

LIBRARY = Path(find_spec("spectral_kv").origin).parent
OURS = {"spectral_kv": LIBRARY, "pipeline": PACKAGE}
RUNNER = "pipeline.run"  # imports whatever every run passes through
# Modules that no number depends on: the tables, what is printed, logged or drawn, how a configuration is written.
PRESENTATION = (
    "pipeline.paper", "pipeline.show", "pipeline.store", "pipeline.settings.cli", "pipeline.settings.compose",
    "pipeline.settings.manual", "pipeline.settings.errors", "pipeline.settings.folders", "pipeline.sources",
)  # fmt: skip


@cache
def _file(module: str) -> Path | None:
    """The source of one of our modules."""
    root, *parts = module.split(".")
    path = OURS[root].joinpath(*parts)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _ours_if_any(name: str) -> bool:
    return name.partition(".")[0] in OURS and _file(name) is not None


@cache
def _read(file: Path) -> bytes:
    return file.read_bytes()


@cache
def _imported(file: Path) -> frozenset[str]:
    """Modules that a source names in its imports, wherever in it; without those relative to its own package."""
    found = set()
    left: list[ast.AST] = [ast.parse(_read(file))]
    while left:
        node = left.pop()
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):  # statements are in no other
            left += getattr(node, field, ())
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if _ours_if_any(name) else node.module for name in inner}
    return frozenset(found)


@cache
def _imports(module: str) -> frozenset[str]:
    """Our modules that one of ours imports.

    The package of a module is not followed: its `__init__` offers everything, and what a module needs it names.
    """
    return frozenset(filter(_ours_if_any, _imported(_file(module))))


def reached(modules: Iterable[str]) -> set[str]:
    """Our modules that some of them, and what they import in turn, are made of; without those that only present."""
    found: set[str] = set()
    left = list(modules)
    while left:
        module = left.pop()
        if module not in found and not any(module == p or module.startswith(f"{p}.") for p in PRESENTATION):
            found.add(module)
            left += _imports(module)
    return found


def _foreign(module: str) -> list[Path]:
    """All sources of the package, or of the file, in which a module of somebody else lies."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return []
    try:
        spec = find_spec(top)
    except ValueError:  # the script that runs, which was not imported
        spec = None
    if spec is None:
        file = getattr(sys.modules.get(top), "__file__", None)
        return [Path(file)] if file else []
    if spec.submodule_search_locations:
        return sorted(p for folder in spec.submodule_search_locations for p in Path(folder).rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _installed(file: Path) -> bool:
    """Whether a source came with an installed package, which has a version; a user's own code has none."""
    return any(file.is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib"))


def _foreign_reached(modules: Iterable[str]) -> tuple[set[Path], set[str]]:
    """Sources of somebody else that modules of theirs are made of, and our modules that those import.

    What they import in turn is followed where it is not installed: the helper beside a method, another package of the
    user's.
    """
    files: set[Path] = set()
    ours: set[str] = set()
    left = list(modules)
    while left:
        for file in set(_foreign(left.pop())) - files:
            files.add(file)
            for name in () if _installed(file) else _imported(file):
                if _ours_if_any(name):
                    ours.add(name)
                elif name.partition(".")[0] not in OURS:
                    left += [name] if not any(map(_installed, _foreign(name))) else []
    return files, ours


def modules_of(thing: object) -> set[str]:
    """The modules of an object's class and of all that it inherits from."""
    return {cls.__module__ for cls in type(thing).__mro__}


@cache  # a process runs what it has imported, whatever happens to the files
def _ours(modules: frozenset[str]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(reached({RUNNER, *modules})):
        digest.update(name.encode() + _read(_file(name)))
    return digest.digest()


def code_fingerprint(backend: str, *objects: object) -> str:
    """Hash of the sources that produce the numbers of a run.

    Parameters
    ----------
    backend : str
        Full path of the class, which need not have been imported.
    *objects
        Method, storage, phases. One may come from a project of the user's own: of that, the whole package counts,
        wherever in its inheritance the class comes from there, and whatever else of theirs it imports.
    """
    names = {module for thing in objects if thing is not None for module in modules_of(thing)}
    names.add(backend.rpartition(".")[0])
    ours = frozenset(name for name in names if name.partition(".")[0] in OURS)
    files, used = _foreign_reached(names - ours)
    digest = hashlib.sha256(_ours(ours | used))
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
