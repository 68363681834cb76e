"""Compressed caches as safetensors files."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import spectral_kv
from spectral_kv import names
from spectral_kv.backends.torch_cache_at_rest import written
from spectral_kv.calibration import QueryStatistics

if TYPE_CHECKING:
    from spectral_kv.backends.torch_generation import GenerationCache
    from spectral_kv.compressor import Compressor

KIND = "spectral_kv cache"


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the model's sizes, dtype and rotation, and of some of its weights."""
    rotation = getattr(model.config, "rope_parameters", None)
    digest = hashlib.sha256(f"{model.dtype}{rotation}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        few = parameter.detach().flatten()[:: max(parameter.numel() // 16, 1)]
        digest.update(few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _text(tokens: Any) -> str | None:
    """Hash of token ids `[batch, tokens]`, or `[tokens]` of a single text."""
    if tokens is None:
        return None
    ids = tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens
    ids = np.atleast_2d(np.asarray(ids, dtype=np.int64))
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Hash of all that a file holds."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that are whole and share no memory, as the format wants them."""
    found, seen = {}, set()
    for name, x in tensors.items():
        x = x.contiguous()
        if x.untyped_storage().nbytes() != x.nbytes or x.data_ptr() in seen:
            x = x.clone()
        seen.add(x.data_ptr())
        found[name] = x
    return found


def _settings(cache: "GenerationCache") -> dict[str, Any]:
    """What the cache was made with, as far as a file can say it."""
    compressor = cache.compressor
    return {
        "method": names.known_as(compressor.scorer, "scorers") or {"own": repr(compressor.scorer)},
        "storage": names.known_as(cache.storage, "storage") or {"own": repr(cache.storage)},
        "budget": asdict(compressor.budget),
        "every": cache.every,
        "decode": cache.decode,
    }


def bases_of(compressor: "Compressor") -> str | None:
    """Hash of the bases that a storage reads."""
    storage, shape = compressor.storage, compressor.backend.shape
    return storage.read((shape.layers, shape.kv_heads, shape.dim)).digest if hasattr(storage, "read") else None


def save(cache: "GenerationCache", path: str | Path, tokens: Any = None, codec: Any = None) -> None:
    """Write a cache to a file, whole or not at all."""
    if not cache.layers[0].sequences:
        raise ValueError("the cache is empty: run the model on a prompt before saving it")
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path} can't be written: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{path} can't be written: it is a folder; give a file in it")
    header = {
        "kind": KIND,
        "version": spectral_kv.__version__,
        "model": fingerprint(cache.compressor.backend.model),
        "tokens": _text(tokens),
        "position": cache.position,
        "seen": [sequence.seen for sequence in cache.layers[0].sequences],
        "settings": _settings(cache),
        "bases": bases_of(cache.compressor),
    }
    if codec is None:
        held = cache.tensors()
    else:
        header["at_rest"], held = written(cache, codec)
    if (statistics := cache.compressor.statistics) is not None:
        numbers = {"mu_re": statistics.mu.real, "mu_im": statistics.mu.imag, "modulus": statistics.modulus}
        held |= {f"statistics.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in numbers.items()}
    held = _apart(held)
    header["digest"] = _digest(header, held)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial, new = Path(folder) / "cache", Path(folder) / "new"
        save_file(held, partial, {"spectral_kv": json.dumps(header)})
        new.touch()
        shutil.copymode(new, partial)  # else it is its owner's alone
        os.replace(partial, path)


def read(
    path: str | Path, model: PreTrainedModel, tokens: Any = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor], QueryStatistics | None]:
    """What a file says of its cache, what it holds and the query statistics, checked against a model and a text."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("spectral_kv", "{}"))
            kind = header.get("kind") if isinstance(header, dict) else None
            held = {name: file.get_tensor(name) for name in file.keys()} if kind == KIND else {}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: give a file that cache.save wrote") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} does not hold a cache ({error}): save it again") from None
    if kind != KIND:
        raise ValueError(f"{path} does not hold a cache: give a file that cache.save wrote")
    if header.get("version") != spectral_kv.__version__:
        raise ValueError(
            f"{path} was written by version {header.get('version')}, this is {spectral_kv.__version__}: make it again"
        )
    if header.pop("digest", None) != _digest(header, held):
        raise ValueError(f"{path} is damaged, its contents are not those that were saved: save it again")
    if header["model"] != fingerprint(model):
        raise ValueError(f"{path} is the cache of another model than this: load that one")
    if tokens is not None and header["tokens"] != _text(tokens):
        raise ValueError(f"{path} is the cache of another text, or was saved without its tokens: make it again")
    numbers = {name: held.pop(f"statistics.{name}", None) for name in ("mu_re", "mu_im", "modulus")}
    if numbers["modulus"] is None:
        return header, held, None
    real, imaginary, modulus = (x.numpy() for x in numbers.values())
    return header, held, QueryStatistics(real + 1j * imaginary, modulus)


def resolved(path: str | Path, group: str, saved: str | dict[str, str], given: Any) -> Any:
    """The scorer or storage that is `given`, or by default the one that a cache was saved with.

    Raises
    ------
    ValueError
        If it has no name and is not given, or the given storage is another.
    """
    key, made = {"scorers": ("method", names.method), "storage": ("storage", names.storage)}[group]
    said = saved if isinstance(saved, str) else saved["own"]
    if given is None:
        if said != saved:
            raise ValueError(f"{path} was saved with {key}={said}, which has no name: pass it as {key}=")
        return made(saved)
    thing = made(given)
    if group == "storage" and (repr(thing) if said != saved else names.known_as(thing, group)) != said:
        raise ValueError(
            f"{path} was saved with storage={said}, not {given}: leave storage out, or make the cache again"
        )
    return thing
