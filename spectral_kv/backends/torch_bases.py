"""Measuring the bases of a model on the torch backend, which alone gives gradients."""

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import DynamicCache

from spectral_kv.codec.bases import Bases, Moments, columns, groups

OFTEN = 60  # seconds after which sums are kept in a file


def gradients(backend, keys: list[torch.Tensor], values: list[torch.Tensor], tokens: np.ndarray, seed: int):
    """Gradients of the log-likelihood of what the model itself predicts, with respect to cached keys and values.

    Labels are drawn from the model's predictions, so that the mean outer product of the gradients is the Fisher
    information: with true labels it would be no measure of what an error changes.

    Parameters
    ----------
    keys, values : list of torch.Tensor, [kv_heads, tokens, dim], one a layer
        As cached, rotated.
    tokens : np.ndarray of int, [following]
        What follows them; each is fed, and each position's prediction is drawn from.

    Returns
    -------
    Two lists like `keys` and `values`.
    """
    leaves = [[x.to(backend.dtype, copy=True).requires_grad_() for x in part] for part in (keys, values)]
    cache = DynamicCache()
    ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=backend.device)[None]
    start = keys[0].shape[-2]
    with torch.enable_grad():
        for layer, (k, v) in enumerate(zip(*leaves, strict=True)):
            cache.update(k[None], v[None], layer)
        positions = torch.arange(start, start + ids.shape[1], device=backend.device)[None]
        logits = backend.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        noise = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        shares = log_probabilities.detach().exp().cpu()
        drawn = torch.multinomial(shares, 1, generator=noise).to(backend.device)
        flat = [x for part in leaves for x in part]
        found = torch.autograd.grad(log_probabilities.gather(1, drawn).sum(), flat)
    return list(found[: len(keys)]), list(found[len(keys) :])


def measure(
    backend,
    windows: Sequence[np.ndarray],
    prompt: int,
    group: int,
    following: int = 512,
    sinks: int = 4,
    sums: Path | None = None,
    progress: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
    **metadata: str,
) -> Bases:
    """Bases of the model of a torch backend, in blocks of at most `group` layers.

    Parameters
    ----------
    windows : sequence of np.ndarray of int, [at least prompt + 1]
    prompt : int
        Tokens of every window whose keys and values are counted.
    following : int
        Tokens after them whose predictions the sensitivity is measured by, where a window has so many.
    sinks : int
        First tokens that are left out: their keys are like no others, and they stay exact.
    sums : path, optional
        File that keeps what was summed up every `OFTEN` seconds, and with which the same measurement goes on if it was
        broken off; it is gone in the end.
    progress : function of the windows
        Yields them, and shows how far it is.
    metadata : str
        Kept with the bases.
    """
    shape = backend.shape
    moments = [Moments(layers) for layers in groups(shape.layers, group)]
    counted, fed = np.arange(sinks, prompt), min(following, min(map(len, windows)) - prompt)
    key = _key(windows, prompt, group, following, sinks, metadata)
    done = _resumed(moments, sums, key, backend.device) if sums else 0
    kept = time.monotonic()
    for seed, window in enumerate(progress(windows)):
        if seed < done:
            continue
        prefill = backend.prefill(window[:prompt], 1)
        grads = gradients(backend, prefill.keys, prefill.values, window[prompt : prompt + following], seed)
        for one in moments:
            parts = []
            for keys, values in ((prefill.keys, prefill.values), grads):
                # A rotation keeps lengths, so gradients turn back as keys do
                turned = [backend.rope.unrotate(keys[i].float()[:, sinks:], counted) for i in one.layers]
                parts.append(columns(turned, [values[i].float()[:, sinks:] for i in one.layers]))
            one.add(*parts)
        if sums and time.monotonic() - kept > OFTEN:
            _keep(moments, sums, key, seed + 1)
            kept = time.monotonic()
    blocks = tuple(one.block(shape.dim) for one in moments)
    if sums:
        sums.unlink(missing_ok=True)
    return Bases(blocks, shape.dim, {"tokens": str(moments[0].tokens), "following": str(fed)} | metadata)


def _key(windows: Sequence[np.ndarray], *settings: Any) -> str:
    """Hash of all that sums depend on."""
    digest = hashlib.sha256(repr(settings).encode())
    for window in windows:
        digest.update(np.asarray(window, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _keep(moments: list[Moments], path: Path, key: str, done: int) -> None:
    """Write sums over the first `done` windows, whole or not at all."""
    tensors = {f"{i}.{name}": x for i, one in enumerate(moments) for name, x in one.tensors().items()}
    new = path.with_name(f"{path.name}.new")
    save_file(tensors, str(new), {"key": key, "done": str(done), "tokens": str(moments[0].tokens)})
    new.replace(path)


def _resumed(moments: list[Moments], path: Path, key: str, device: torch.device) -> int:
    """How many windows the sums in a file are over, with which moments go on; 0 if it has those of something else."""
    try:
        with safe_open(str(path), framework="np") as file:
            said = file.metadata() or {}
            if said.get("key") != key:
                return 0
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return 0
    for index, one in enumerate(moments):
        own = {name: held[f"{index}.{name}"] for name in ("sum", "outer", "squares")}
        one.resume(int(said["tokens"]), own, torch.empty(0, device=device))
    return int(said["done"])
