"""Measuring the bases of a model on the torch backend, which alone gives gradients."""

from collections.abc import Iterable

import numpy as np
import torch
from transformers import DynamicCache

from spectral_kv.codec.bases import Bases, Moments, columns, groups


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
    windows: Iterable[np.ndarray],
    prompt: int,
    group: int,
    following: int = 512,
    sinks: int = 4,
    **metadata: str,
) -> Bases:
    """Bases of the model of a torch backend, in blocks of at most `group` layers.

    Parameters
    ----------
    windows : iterable of np.ndarray of int, [at least prompt + 1]
    prompt : int
        Tokens of every window whose keys and values are counted.
    following : int
        Tokens after them whose predictions the sensitivity is measured by, where a window has so many.
    sinks : int
        First tokens that are left out: their keys are like no others, and they stay exact.
    metadata : str
        Kept with the bases.
    """
    shape = backend.shape
    moments = [Moments(layers) for layers in groups(shape.layers, group)]
    counted, fed = np.arange(sinks, prompt), following
    for seed, window in enumerate(windows):
        prefill = backend.prefill(window[:prompt], 1)
        fed = min(fed, len(window) - prompt)
        grads = gradients(backend, prefill.keys, prefill.values, window[prompt : prompt + following], seed)
        for sums in moments:
            parts = []
            for keys, values in ((prefill.keys, prefill.values), grads):
                # A rotation keeps lengths, so gradients turn back as keys do
                turned = [backend.rope.unrotate(keys[i].float()[:, sinks:], counted) for i in sums.layers]
                parts.append(columns(turned, [values[i].float()[:, sinks:] for i in sums.layers]))
            sums.add(*parts)
    blocks = tuple(sums.block(shape.dim) for sums in moments)
    return Bases(blocks, shape.dim, {"tokens": str(moments[0].tokens), "following": str(fed)} | metadata)
