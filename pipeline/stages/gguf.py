"""Checkpoint folders made from GGUF files, once for every file, for the backends to load."""

import json
import os
import shutil
import struct
import sys
import time
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from pipeline.settings.errors import InputError
from pipeline.stages.digest import digest

CONVERTER = 1  # raise it when the same file would be converted to something else
MANIFEST = "conversion.json"  # written last: what the folder was made from, and the SHA-256 of every file in it
KINDS = ("llama", "qwen2", "qwen3")  # general.architecture
SUFFIXES = (".safetensors", ".json", ".jinja")


def converted(file: Path, checkpoints: Path) -> Path:
    """The checkpoint folder that holds what a GGUF file does, under `checkpoints`.

    It is made the first time. A folder counts when its manifest is there and every file in it has the SHA-256 that the
    manifest names; anything else is made again.

    Raises
    ------
    InputError
        If the file is no whole GGUF file of a kind that can be read, or a package is missing.
    """
    _opens(file)
    folder = checkpoints / "converted" / f"{file.stem}-{digest(file)[:16]}-v{CONVERTER}"
    if intact(folder):
        return folder
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise InputError(
            f"model.path={file} is a GGUF file, which needs the package {missing[0]}: pip install 'spectral-kv[gguf]'"
        )
    try:
        _made(file, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"checkpoints={checkpoints} can't be written to ({getattr(error, 'strerror', None) or error}): "
            "set checkpoints=<a folder of yours with room>"
        ) from None
    return folder


def _made(file: Path, folder: Path) -> None:
    """Convert a file to a folder, unless another process has done it meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for left in folder.parent.glob(f"{folder.name}.part*"):  # of a conversion that was killed
            shutil.rmtree(left)
        if not intact(folder):
            start = time.perf_counter()
            print(f"converting {file} once ...", file=sys.stderr)
            part = folder.with_name(f"{folder.name}.part")
            _convert(file, part)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            print(f"converted to {folder} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def intact(folder: Path) -> bool:
    """Whether a folder holds every file that its manifest names, as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(digest(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _opens(file: Path) -> None:
    with file.open("rb") as opened:
        head = opened.read(8)
    if head[:4] != b"GGUF":
        raise InputError(f"model.path={file} is not a GGUF file (it begins with {head[:4]!r}): fetch it again")
    if len(head) < 8 or struct.unpack("<I", head[4:])[0] not in (2, 3):
        raise InputError(f"model.path={file} is GGUF of a version that can't be read: versions 2 and 3 can")


def _readable(file: Path) -> None:
    """Refuse what transformers would read as something else, or not at all."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        kind = reader.get_field("general.architecture").contents()
        scaling = reader.get_field(f"{kind}.rope.scaling.type")
        parts = reader.get_field("split.count")
        names = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # the reader meets a damaged file with whatever numpy says
        raise InputError(
            f"model.path={file} can't be read as GGUF ({type(error).__name__}: {error}): "
            "it is cut short or damaged, fetch it again"
        ) from None
    if kind not in KINDS:
        raise InputError(
            f"model.path={file} is of type {kind}: GGUF files of {', '.join(KINDS)} are read, "
            "for others give the folder of a Hugging Face checkpoint"
        )
    if parts is not None and parts.contents() > 1:
        raise InputError(
            f"model.path={file} is one of {parts.contents()} parts of a model, and only whole files are read: "
            "join them with `llama-gguf-split --merge`, or give the folder of a Hugging Face checkpoint"
        )
    # transformers reads neither, and would rotate by other angles than the model was trained with
    if "rope_freqs.weight" in names or (scaling is not None and scaling.contents() != "none"):
        raise InputError(
            f"model.path={file} has a scaled rotation (Llama 3.1 and later), which transformers does not read from "
            "GGUF: give the folder of the Hugging Face checkpoint"
        )


@lru_cache(maxsize=1)
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert(file: Path, folder: Path) -> None:
    _readable(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _quiet()
    where = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(file.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.float32,
            output_loading_info=True, **where,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    except Exception as error:  # as many kinds as there are ways to be damaged
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model.path={file} can't be converted ({type(error).__name__}: {reason}): "
            "fetch it again, or give the folder of a Hugging Face checkpoint"
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"model.path={file} has no weights for {missing[0]} and {len(missing) - 1} more: fetch it again"
        )
    model = model.to(torch.bfloat16)
    for name, weights in model.named_parameters():
        if not torch.isfinite(weights).all():
            raise InputError(f"model.path={file} has weights that are no numbers in {name}: fetch it again")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # or the weights would be taken for packed ones
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = {
        "source": digest(file),
        "converter": CONVERTER,
        "files": {path.name: digest(path) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES},
    }
    written = folder / f"{MANIFEST}.part"
    written.write_text(json.dumps(made, indent=2) + "\n")
    os.replace(written, folder / MANIFEST)
