"""Compressed caches as safetensors files."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import spectral_kv

if TYPE_CHECKING:
    from spectral_kv.backends.torch_generation import GenerationCache

KIND = "spectral_kv cache"


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the model's sizes, dtype and of some of its weights."""
    digest = hashlib.sha256(f"{model.dtype}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        few = parameter.detach().flatten()[:: max(parameter.numel() // 16, 1)]
        digest.update(few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _text(tokens: Any) -> str | None:
    """Hash of token ids."""
    if tokens is None:
        return None
    ids = tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


def save(cache: "GenerationCache", path: str | Path, tokens: Any = None) -> None:
    """Write a cache to a file, whole or not at all."""
    if not cache.layers[0].sequences:
        raise ValueError("the cache is empty: run the model on a prompt before saving it")
    budget = cache.compressor.budget
    header = {
        "kind": KIND,
        "version": spectral_kv.__version__,
        "model": fingerprint(cache.compressor.backend.model),
        "tokens": _text(tokens),
        "position": cache.position,
        "seen": [sequence.seen for sequence in cache.layers[0].sequences],
        "budget": budget.tokens,
        "sinks": budget.sinks,
        "recent": budget.recent,
    }
    path = Path(path)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(cache.tensors(), partial, {"spectral_kv": json.dumps(header)})
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def header(path: str | Path, model: PreTrainedModel, tokens: Any = None) -> dict[str, Any]:
    """What a file says of its cache, checked against a model and a text."""
    try:
        with safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("spectral_kv", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold a cache ({error}): save it again") from None
    if found.get("kind") != KIND:
        raise ValueError(f"{path} does not hold a cache: give a file that cache.save wrote")
    if found["version"] != spectral_kv.__version__:
        raise ValueError(
            f"{path} was written by version {found['version']}, this is {spectral_kv.__version__}: make it again"
        )
    if found["model"] != fingerprint(model):
        raise ValueError(f"{path} is the cache of another model than this: load that one")
    if tokens is not None and found["tokens"] != _text(tokens):
        raise ValueError(f"{path} is the cache of another text, or was saved without its tokens: make it again")
    return found


def restored(cache: "GenerationCache", path: str | Path, header: dict[str, Any]) -> "GenerationCache":
    """An empty cache, filled from a file."""
    cache.restore(load_file(str(path)), header["position"], header["seen"])
    return cache
