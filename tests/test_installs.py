"""Two installs from one wheel: the library alone, and with `[pipeline]` the experiments."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import spectral_kv

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
LIBRARY = Path(spectral_kv.__file__).parent
MODULES = {"hydra-core": "hydra", "pyyaml": "yaml", "pywavelets": "pywt"}  # where a module is not called as its package


def modules(requirements: list[str]) -> set[str]:
    """Names under which requirements are imported."""
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


OURS = modules(PROJECT["dependencies"])
PIPELINES = modules(PROJECT["optional-dependencies"]["pipeline"])


def imported(source: str) -> set[str]:
    """First parts of the names of all modules that a source imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def test_the_library_imports_nothing_that_only_the_pipeline_requires():
    assert {"hydra", "omegaconf", "mlflow", "pandas", "matplotlib", "rich", "yaml"} <= PIPELINES
    for path in sorted(LIBRARY.rglob("*.py")):
        assert not imported(path.read_text()) & (PIPELINES | {"pipeline"}), path


def test_the_library_requires_what_it_imports():
    found = {name for path in LIBRARY.rglob("*.py") for name in imported(path.read_text())}
    optional = {
        "mlx",
        "mlx_lm",
        "hqq",
        "optimum",
        "lm_eval",
        "datasets",
        "tqdm",
        "spectral_kv",
        *sys.stdlib_module_names,
    }
    assert found - optional <= OURS | {"triton"}  # triton comes with torch where there is a GPU
    assert found >= OURS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(Path(__file__).parents[1])], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_carries_what_the_pipeline_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "conf/config.yaml",
        "conf/hydra/help/pipeline.yaml",
        "paper/published.yaml",
        "reference_model/checkpoint/model.safetensors",
        "reference_model/query_statistics.safetensors",
    ):
        assert f"pipeline/{name}" in names
    assert not any(name.startswith("conf/") for name in names)
    for name in ("choices.yaml", "lookups.yaml", "documents.jsonl"):
        assert f"spectral_kv/lm_eval/tasks/{name}" in names


def brought_along() -> set[str]:
    """Packages that the library's requirements require in turn."""
    found, left = set(), [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # for another system
            continue
        left += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.slow
def test_the_wheel_without_extras_is_the_library(wheel, tmp_path):
    """In a fresh environment with the library's requirements, linked instead of installed, and no other package."""
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env" / "lib").glob("*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    hidden = PIPELINES - modules(sorted(brought_along()))
    assert {"hydra", "omegaconf", "mlflow", "pandas", "matplotlib"} <= hidden
    for path in Path(pytest.__file__).parents[1].iterdir():
        name = re.split(r"[-.]", path.name)[0].lower()
        if not (site / path.name).exists() and name not in hidden | {"hydra_core", "_editable_impl_spectral_kv"}:
            (site / path.name).symlink_to(path)
    python = str(tmp_path / "env" / "bin" / "python")
    code = (
        "import importlib, pkgutil, sys, spectral_kv\n"
        "assert spectral_kv.__file__.startswith(sys.prefix), spectral_kv.__file__\n"
        "for module in pkgutil.walk_packages(spectral_kv.__path__, 'spectral_kv.'):\n"
        "    if 'mlx' not in module.name and 'lm_eval.' not in module.name: importlib.import_module(module.name)\n"
        "from spectral_kv.backends.torch import TorchBackend\n"
        "print(len(sys.modules))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) > 500, done.stderr
    done = subprocess.run([python, "-m", "pipeline"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().count("\n") == 0
    assert (
        done.stderr.startswith("pipeline: the experiment pipeline needs hydra")
        and "spectral-kv[pipeline]" in done.stderr
    )


THREE_LINES = """
import sys
import spectral_kv
from transformers import AutoModelForCausalLM, AutoTokenizer

assert spectral_kv.__file__.startswith(sys.prefix), spectral_kv.__file__
folder = spectral_kv.reference_model()
assert str(folder).startswith(sys.prefix), folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Lists are mutable sequences. " * 60, return_tensors="pt")
cache = spectral_kv.cache(model, "wavelet_tri", budget=160, storage="turboquant_4bit")
ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
print(ids.shape[1] - inputs.input_ids.shape[1], cache.held, cache.position)
"""


@pytest.mark.slow
def test_an_empty_environment_installs_it_and_runs_the_three_lines_elsewhere(tmp_path):
    """With what its requirements bring and nothing else, in the tested versions, outside the checkout."""
    root, python = Path(__file__).parents[1], tmp_path / "env" / "bin" / "python"
    venv.create(tmp_path / "env", with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(root / "constraints.txt")]
    for what in ("torch", str(root)):  # torch first: as in the Makefile
        done = subprocess.run([*pip, what], capture_output=True, text=True, cwd=tmp_path)
        if done.returncode and "Could not find a version" in done.stderr:
            pytest.skip("no package registry can be reached")
        assert done.returncode == 0, done.stderr
    done = subprocess.run([str(python), "-c", THREE_LINES], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    new, held, position = map(int, done.stdout.split())
    assert (new, held) == (5, 160 + 4) and position > 300
