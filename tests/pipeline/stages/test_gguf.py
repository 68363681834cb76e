import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.stages import gguf
from pipeline.stages.checkpoint import Checkpoint
from tests.pipeline.stages.gguf_file import small_llama, write

pytest.importorskip("gguf")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model():
    return small_llama()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A file, and the folder that it was converted to."""
    root = tmp_path_factory.mktemp("gguf")
    file = write(model, root / "small.gguf")
    return file, gguf.converted(file, root)


@pytest.fixture
def copied(made, tmp_path):
    """The same in a place of the test's own."""
    file, folder = made
    shutil.copy(file, tmp_path / file.name)
    shutil.copytree(folder, tmp_path / "converted" / folder.name)
    return tmp_path / file.name, tmp_path / "converted" / folder.name


@pytest.fixture
def conversions(monkeypatch):
    """The files that are converted while the test runs."""
    seen, convert = [], gguf._convert

    def counted(file, folder):
        seen.append(file)
        convert(file, folder)

    monkeypatch.setattr(gguf, "_convert", counted)
    return seen


def test_a_converted_file_is_the_model_that_was_written(model, made):
    """Logits in float32: nothing is lost, as the weights were bfloat16 before."""
    from spectral_kv.backends.torch import TorchBackend

    tokens = np.random.default_rng(0).integers(2, 500, size=90)
    prefill = TorchBackend(str(made[1]), device="cpu", dtype="float32").prefill(tokens, observe=1)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0, -1]
    torch.testing.assert_close(prefill.logits, expected, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_and_the_chat_template_come_along(made):
    words = Checkpoint(made[1]).tokenizer.encode("Keys are signals.", add_special_tokens=False)
    assert len(words.ids) > 2
    assert Checkpoint(made[1]).tokenizer.decode(words.ids).strip() == "Keys are signals."
    assert (made[1] / "chat_template.jinja").is_file()


def test_a_file_is_converted_once_and_its_hash_is_the_model_s(copied, conversions):
    file, folder = copied
    assert gguf.converted(file, file.parent) == folder
    moved = file.rename(file.with_name("small.gguf.gguf")).rename(file)
    assert gguf.converted(moved, file.parent) == folder
    assert conversions == []
    before = Checkpoint(folder, file).hash
    with file.open("r+b") as opened:
        opened.seek(-3, 2)
        opened.write(b"\x01")
    assert Checkpoint(folder, file).hash != before
    assert gguf.converted(file, file.parent) != folder and conversions == [file]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest", "half a manifest", "no folder"])
def test_a_damaged_conversion_does_not_count(damage, copied):
    _, folder = copied
    weights, manifest = folder / "model.safetensors", folder / gguf.MANIFEST
    assert gguf.intact(folder)
    before = weights.read_bytes()
    if damage == "flipped":
        weights.write_bytes(before[:-7] + bytes([before[-7] ^ 1]) + before[-6:])
    elif damage == "cut":
        weights.write_bytes(before[: len(before) // 2])
    elif damage == "gone":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        shutil.rmtree(folder)
    assert not gguf.intact(folder)


def test_a_damaged_conversion_is_made_again(copied, conversions):
    file, folder = copied
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-7] + bytes([before[-7] ^ 1]) + before[-6:])
    left = folder.with_name(f"{folder.name}.part")  # of a conversion that was killed
    left.mkdir()
    (left / "model.safetensors").write_bytes(before[:100])
    assert gguf.converted(file, file.parent) == folder
    assert conversions == [file]
    assert weights.read_bytes() == before
    assert not left.exists()


@pytest.mark.faults
def test_a_conversion_killed_at_any_moment_leaves_nothing_half_written(made, tmp_path):
    file = shutil.copy(made[0], tmp_path / "small.gguf")
    command = (
        "import sys, pathlib; from pipeline.stages.gguf import converted; converted(*map(pathlib.Path, sys.argv[1:]))"
    )
    for seconds in (2.0, 4.0, 6.0, 7.0, 8.0, 9.0):
        process = subprocess.Popen([sys.executable, "-c", command, str(file), str(tmp_path)], stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in (tmp_path / "converted").glob("small-*-v*"):
            if folder.suffix not in (".lock", ".part"):
                assert gguf.intact(folder)
    folder = gguf.converted(file, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == (made[1] / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("converted/*.part"))


@pytest.mark.parametrize("size", [0, 3, 6, 20, 3_000, 20_000, 100_000, -1000])
def test_a_file_cut_short_is_refused_in_a_sentence(size, made, tmp_path):
    whole = made[0].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"^model\.path=.*cut\.gguf .* fetch it again$|version that can't be read"):
        gguf.converted(cut, tmp_path)
    assert not list(tmp_path.glob("converted/cut-*-v1"))


def test_other_kinds_and_scaled_rotations_are_refused(model, tmp_path):
    with pytest.raises(InputError, match="is of type mamba: GGUF files of llama, qwen2, qwen3 are read"):
        gguf.converted(write(model, tmp_path / "other.gguf", kind="mamba"), tmp_path)
    with pytest.raises(InputError, match=r"scaled rotation \(Llama 3\.1 and later\).* folder of the Hugging Face"):
        gguf.converted(write(model, tmp_path / "scaled.gguf", scaled=True), tmp_path)


def test_a_part_of_a_model_is_refused(model, tmp_path):
    with pytest.raises(InputError, match=r"one of 3 parts of a model, .*: join them with `llama-gguf-split --merge`"):
        gguf.converted(write(model, tmp_path / "part.gguf", parts=3), tmp_path)


def test_a_place_that_can_not_be_written_to_is_said_in_a_sentence(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        InputError, match=r"checkpoints=.*file can't be written to \(Not a directory\): set checkpoints="
    ):
        gguf.converted(made[0], tmp_path / "file")

    def full(file, folder):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf, "_convert", full)
    with pytest.raises(InputError, match=r"can't be written to \(I/O error: No space left on device"):
        gguf.converted(made[0], tmp_path)


def test_weights_that_are_no_numbers_are_refused(model, tmp_path):
    import copy

    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"no numbers in model\.layers\.1\.mlp\.up_proj\.weight: fetch it again"):
        gguf.converted(write(broken, tmp_path / "nan.gguf"), tmp_path)


def test_a_gguf_file_is_a_model_like_any_other(copied, run, small):
    """And runs of it are reused: a second one has the same identity."""
    file, _ = copied
    settings = [f"model.path={file}", f"checkpoints={file.parent}", "method=snapkv"]
    first, second = run(*settings), run(*settings)
    assert first.metrics["aop/mean"] > 0
    assert (first.reused, second.reused) == (False, True)
    job = prepare(composed([*small, *settings]))
    assert job.checkpoint.shape.kv_heads == 2 and job.checkpoint.gguf == file


def test_what_is_neither_folder_nor_gguf_is_refused(small, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"weights")
    for path, said in [("model.bin", "is not a folder"), ("none.gguf", "is not there"), ("none", "is not a folder")]:
        with pytest.raises(InputError, match=f"{said}.* checkpoint"):
            prepare(composed([*small, f"model.path={tmp_path / path}"]))
    (tmp_path / "model.gguf").write_bytes(b"weights of something else")
    with pytest.raises(InputError, match="is not a GGUF file"):
        prepare(composed([*small, f"model.path={tmp_path / 'model.gguf'}", f"checkpoints={tmp_path}"]))
