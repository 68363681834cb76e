"""The library knows no framework; its backends, engine, caches at rest and model for lm_eval know torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spectral_kv

ROOT = Path(spectral_kv.__file__).parent
SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not {"at_rest", "backends", "engine", "lm_eval"} & set(path.relative_to(ROOT).parts)
]
FRAMEWORKS = {"torch", "mlx", "mlx_lm"}


def imported(source: str) -> set[str]:
    """First parts of the names of all modules that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_are_found_in_functions_too():
    assert imported("def f():\n    import torch.nn\n    from mlx.core import array\n") == {"torch", "mlx"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_framework_is_imported(path):
    assert not imported(path.read_text()) & FRAMEWORKS


def test_importing_all_of_it_loads_no_framework():
    names = [".".join(["spectral_kv", *path.relative_to(ROOT).with_suffix("").parts]) for path in SOURCES]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    code += f"print(sorted({FRAMEWORKS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stderr
