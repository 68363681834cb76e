"""Compressed caches at rest: what a file holds of them when a codec writes it."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from spectral_kv.at_rest.content import AtRest
from spectral_kv.at_rest.storage import SpectralAtRest
from spectral_kv.measured_files import bases_of
from spectral_kv.storage.dense import Dense

if TYPE_CHECKING:
    from spectral_kv.backends.torch import TorchBackend
    from spectral_kv.backends.torch_generation import GenerationCache

EXPECTED = 0.003  # nats
STORED = ("keys", "values", "positions")  # what the codec stands for, of the tensors of a dense layer


def settled(codec: str | SpectralAtRest | None, model: PreTrainedModel, layers: int | None = None) -> SpectralAtRest:
    """A codec with the bases of a model.

    Without one, or by its name, it aims at a KL of `EXPECTED` nats, which caches of all lengths can meet.
    """
    if codec is None or codec == "spectral":
        codec = SpectralAtRest(ratio=None, distortion=EXPECTED, layers=layers)
    if not isinstance(codec, SpectralAtRest):
        raise ValueError(f"codec={codec} is not known: choose spectral, or leave it out")
    return codec.at(bases_of(model, codec.bases))


def written(
    cache: "GenerationCache", codec: str | SpectralAtRest
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What a codec writes: a header for every sequence, and the tensors of the cache, coded.

    Raises
    ------
    ValueError
        If the cache is not dense, or heads hold different tokens.
    """
    if not isinstance(cache.compressor.storage, Dense):
        raise ValueError(f"a codec writes dense caches, and this one has storage={cache.storage}: leave codec out")
    codec = settled(codec, cache.compressor.backend.model)
    headers, tensors = [], {}
    for name, x in cache.tensors().items():
        if name.rpartition(".")[2] not in STORED and x.numel():
            tensors[name] = x
    for row, layers in enumerate(zip(*(layer.sequences for layer in cache.layers), strict=True)):
        positions = layers[0].positions[0]
        if any((layer.positions != positions).any() for layer in layers):
            raise ValueError(
                "a codec treats heads and layers in common, and here every head has evicted tokens of its own: "
                "leave codec out, or choose method=full"
            )
        keys, values = zip(*(layer.stored.load() for layer in layers), strict=True)
        rope = cache.compressor.backend.rope
        coded = codec.encode([x[0] for x in keys], [x[0] for x in values], positions, rope)
        headers.append(coded.header)
        tensors |= {f"at_rest.{row}.{name}": torch.from_numpy(x) for name, x in coded.tensors.items()}
    return headers, tensors


def awake(
    headers: list[dict[str, Any]],
    tensors: dict[str, torch.Tensor],
    backend: "TorchBackend",
    codec: SpectralAtRest | None = None,
) -> dict[str, torch.Tensor]:
    """Tensors of the dense cache that `written` has written."""
    codec = settled(codec, backend.model, headers[0]["layers"])
    shape = (backend.shape.layers, backend.shape.kv_heads, backend.shape.dim)
    found = {name: x for name, x in tensors.items() if not name.startswith("at_rest.")}
    template = torch.empty(0, dtype=backend.cache_dtype, device=backend.device)
    none = template.new_empty((backend.shape.query_heads, 0, backend.shape.dim))
    for row, header in enumerate(headers):
        start = f"at_rest.{row}."
        coded = {name.removeprefix(start): x.numpy() for name, x in tensors.items() if name.startswith(start)}
        positions = coded.get("positions", np.arange(header["tokens"])).astype(np.int64)
        positions = torch.from_numpy(np.tile(positions, (backend.shape.kv_heads, 1)))
        for index, (keys, values) in enumerate(codec.decode(AtRest(header, coded), shape, backend.rope, template)):
            place = f"{index}.{row}."
            found |= {f"{place}keys": keys[None], f"{place}values": values[None], f"{place}positions": positions}
            found.setdefault(f"{place}queries", none)
    return found
