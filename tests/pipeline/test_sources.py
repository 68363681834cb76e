import sys

import pytest

from pipeline import job, run, sources
from pipeline.phases.memory import Memory
from pipeline.sources import code_fingerprint, reached
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.h2o import H2O
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.quantized_cache import QuantizedCacheStorage

TORCH = "spectral_kv.backends.torch.TorchBackend"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of a user's own: a method, the class that it inherits from, and a file that both use."""
    folder = tmp_path / "users_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "weights.py").write_text("WEIGHT = 1\n")
    (folder / "base.py").write_text("from users_methods.weights import WEIGHT\nclass Base:\n    weight = WEIGHT\n")
    (folder / "mine.py").write_text("from users_methods.base import Base\nclass Mine(Base):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("users_methods")]:
        del sys.modules[name]


def fingerprint(backend: str, *objects: object) -> str:
    sources._ours.cache_clear()
    return code_fingerprint(backend, *objects)


@pytest.mark.parametrize("changed", ["mine.py", "base.py", "weights.py"])
def test_any_change_of_a_users_package_counts(project, changed):
    from users_methods.mine import Mine

    before = fingerprint(TORCH, Mine())
    assert fingerprint(TORCH, Mine()) == before
    with (project / changed).open("a") as file:
        file.write("# changed\n")
    assert fingerprint(TORCH, Mine()) != before


@pytest.mark.parametrize("changed", ["helpers.py", "others/deep.py"])
def test_what_a_users_file_imports_counts(project, tmp_path, changed):
    """A method in a file of its own, the helper beside it, and a package that the helper imports."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "__init__.py").write_text("")
    (tmp_path / "others" / "deep.py").write_text("WEIGHT = 1\n")
    (tmp_path / "helpers.py").write_text("import numpy\nfrom others.deep import WEIGHT\n")
    (tmp_path / "mymethod.py").write_text("from helpers import WEIGHT\nclass Mine:\n    weight = WEIGHT\n")
    before = fingerprint("mymethod.Mine")
    (tmp_path / changed).write_text("WEIGHT = -1\n")
    assert fingerprint("mymethod.Mine") != before


def test_modules_of_ours_that_a_users_file_imports_count(project, monkeypatch, tmp_path):
    (project / "mine.py").write_text("from spectral_kv.transforms import fourier\n")
    before = fingerprint("users_methods.mine.Mine")
    original = sources._file
    other = tmp_path / "other.py"
    other.write_bytes(original("spectral_kv.transforms.fourier").read_bytes() + b"# changed\n")
    monkeypatch.setattr(
        sources, "_file", lambda name: other if name == "spectral_kv.transforms.fourier" else original(name)
    )
    assert fingerprint("users_methods.mine.Mine") != before


def test_a_class_of_ours_that_inherits_from_a_users_counts_too(project):
    from users_methods.base import Base

    class Here(Wavelet, Base):
        pass

    before = fingerprint(TORCH, Here())
    (project / "base.py").write_text("# changed\n")
    assert fingerprint(TORCH, Here()) != before


def test_the_source_of_a_users_backend_counts_before_it_is_imported(project):
    before = fingerprint("users_methods.mine.Mine")
    (project / "weights.py").write_text("WEIGHT = 2\n")
    assert fingerprint("users_methods.mine.Mine") != before
    assert "users_methods.mine" not in sys.modules


def test_a_method_does_not_hash_the_files_of_another():
    modules = reached({sources.RUNNER, Fourier.__module__})
    assert {"pipeline.run", "pipeline.stages.prefill", "spectral_kv.transforms.fourier", "spectral_kv.xp"} <= modules
    assert not {"spectral_kv.scorers.kvzip", "spectral_kv.scorers.h2o", "pipeline.phases.drift"} & modules
    assert not any(name.startswith(("pipeline.paper", "pipeline.show", "pipeline.store")) for name in modules)
    assert fingerprint(TORCH, Fourier(), Memory()) != fingerprint(TORCH, H2O(), Memory())


@pytest.mark.parametrize("module", ["pipeline.stages.compress", "spectral_kv.transforms.wavelet", "spectral_kv.xp"])
def test_what_a_run_passes_through_counts(module, monkeypatch, tmp_path):
    before = fingerprint(TORCH, Wavelet())
    original = sources._file
    other = tmp_path / "other.py"
    other.write_bytes(original(module).read_bytes() + b"# changed\n")
    monkeypatch.setattr(sources, "_file", lambda name: other if name == module else original(name))
    assert fingerprint(TORCH, Wavelet()) != before


def test_versions_of_the_packages_that_decide(monkeypatch):
    monkeypatch.setattr(job, "version", lambda name: f"of {name}")
    monkeypatch.setattr("spectral_kv.storage.quantized_cache.find_spec", lambda name: True)

    class Torch:
        _target_, name = TORCH, "torch"

    assert "scipy" in job._versions(Torch, Dense()) and "hqq" not in job._versions(Torch, Dense())
    assert job._versions(Torch, QuantizedCacheStorage("hqq"))["hqq"] == "of hqq"
    assert job._versions(Torch, QuantizedCacheStorage("quanto"))["optimum-quanto"] == "of optimum-quanto"


def test_the_model_of_a_gpu_is_part_of_where_a_run_was_made(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert run.hardware("cuda:0") == run.hardware("cuda:1") == "cuda a card"
    assert (run.hardware("cpu"), run.hardware("gpu")) == ("cpu", "gpu")


def test_imports_are_found_wherever_a_statement_may_stand(tmp_path):
    places = [
        "if x:\n    import m\nelse:\n    import n",
        "try:\n    import m\nexcept E:\n    import n\nelse:\n    import o",
        "try:\n    pass\nfinally:\n    import m",
        "for x in y:\n    import m\nelse:\n    import n",
        "match x:\n    case 1:\n        import m",
        "class A:\n    def f(self):\n        with x:\n            import m",
    ]
    for number, text in enumerate(places):
        file = tmp_path / f"{number}.py"
        file.write_text(text)
        assert sources._imported(file) == {name for name in "mno" if f"import {name}" in text}, text
