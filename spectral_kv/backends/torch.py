"""The torch backend: any full-attention causal model of transformers, on CPU or CUDA."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.logging import disable_progress_bar

from spectral_kv.backends.base import Contents, Extension, ModelShape, Prefill
from spectral_kv.backends.suitable import attends_to_all, can_be_unrotated, depends_on_length
from spectral_kv.rope import Rope
from spectral_kv.storage.base import Storage, Stored
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.xp import rows, to_numpy

ATTENTION = "spectral_kv"
ROOM = 256  # tokens

_observed: ContextVar[dict[int, torch.Tensor] | None] = ContextVar("observed", default=None)


def _observing_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA that leaves a copy of the rotated queries with whoever is watching."""
    observed = _observed.get()
    if observed is not None:
        observed[module.layer_idx] = query[0]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _observing_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def _observing() -> Iterator[dict[int, torch.Tensor]]:
    observed: dict[int, torch.Tensor] = {}
    token = _observed.set(observed)
    try:
        yield observed
    finally:
        _observed.reset(token)


class CompressedLayer(DynamicLayer):
    """Stored tokens of one layer, `[batch, kv_heads, tokens, dim]`.

    Dense tokens grow in place, in buffers with room for `ROOM` more: joining arrays at every step would copy the whole
    cache a token, and slow a large cache down more than a small one.
    """

    def __init__(self, stored: Stored, dtype: torch.dtype):
        super().__init__()
        self.stored, self.cache_dtype = stored, dtype
        self._buffers: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        new = [x.to(self.cache_dtype) for x in (key_states, value_states)]
        self.stored = self._grown(*new) if isinstance(self.stored, DenseTokens) else self.stored.append(*new)
        keys, values = self.stored.load()
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def reserve(self, tokens: int) -> None:
        """Make room for so many dense tokens more, where there is less."""
        if not isinstance(self.stored, DenseTokens):
            return
        stop = self.stored.tokens + tokens
        if not self._buffers or stop > self._buffers[0].shape[-2]:
            old = self.stored.load()
            self._buffers = [x.new_empty((*x.shape[:-2], stop, x.shape[-1])) for x in old]
            for buffer, x in zip(self._buffers, old, strict=True):
                buffer[..., : self.stored.tokens, :] = x
            self.stored = DenseTokens(*(buffer[..., : self.stored.tokens, :] for buffer in self._buffers))

    def _grown(self, *new: torch.Tensor) -> DenseTokens:
        start, stop = self.stored.tokens, self.stored.tokens + new[0].shape[-2]
        if not self._buffers or stop > self._buffers[0].shape[-2]:
            self.reserve(stop - start + ROOM)
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[..., start:stop, :] = x
        return DenseTokens(*(buffer[..., :stop, :] for buffer in self._buffers))

    def get_seq_length(self) -> int:
        return self.stored.tokens

    @property
    def allocated(self) -> int:
        """Bytes that the allocator holds for the layer."""
        if self._buffers:
            return sum(x.nbytes for x in self._buffers)
        return self.stored.nbytes


class CompressedCache(Cache):
    """A cache with fewer rows than its position.

    Rows are what attention reads, the position is where the next token goes.

    Parameters
    ----------
    layers : list of CompressedLayer
    position : int
        Logical position of the next token.
    kept : list of np.ndarray, [kv_heads, rows], one a layer
        Logical positions of the rows that were there at `since`; rows fed later follow one another from it.
    batch : int
        Number of equal sequences.
    """

    def __init__(self, layers: list[CompressedLayer], position: int, kept: list[np.ndarray], batch: int = 1):
        super().__init__(layers=layers)
        self.position, self.since, self.kept, self.batch = position, position, kept, batch

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that must live to continue decoding."""
        return sum(layer.stored.nbytes for layer in self.layers)

    @property
    def allocated(self) -> int:
        """Bytes that the allocator holds for it, room to grow included."""
        return sum(layer.allocated for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more at once, instead of step by step."""
        for layer in self.layers:
            layer.reserve(tokens)

    def positions(self, layer: int) -> np.ndarray:
        """Logical positions `[kv_heads, rows]` of all rows of a layer."""
        kept = self.kept[layer]
        fed = np.arange(self.since, self.position)
        return np.concatenate([kept, np.broadcast_to(fed, (kept.shape[0], len(fed)))], axis=1)

    def copy(self) -> "CompressedCache":
        """A cache that can be extended without touching this one; it makes buffers of its own when it grows."""
        layers = [CompressedLayer(x.stored, x.cache_dtype) for x in self.layers]
        twin = CompressedCache(layers, self.position, self.kept, self.batch)
        twin.since = self.since
        return twin


class TorchBackend:
    """A causal language model of transformers.

    Parameters
    ----------
    folder : str
        A Hugging Face checkpoint: config.json and safetensors. Nothing is downloaded and no code of the checkpoint
        runs.
    device : str
        `cpu`, `cuda`, `cuda:1`, ... or `auto` for CUDA where there is one.
    dtype : str
        Of weights and arithmetic: `float32`, `bfloat16`, `float16`, or `auto` for float32 on CPU and bfloat16 on CUDA.
    cache_dtype : str
        Of cached keys and values.

    Raises
    ------
    ValueError
        If the model has layers that do not attend to all tokens, or a rotation that depends on the length of the
        prompt.
    """

    def __init__(self, folder: str, device: str = "auto", dtype: str = "auto", cache_dtype: str = "bfloat16"):
        self._settle(device, dtype, cache_dtype)
        disable_progress_bar()
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
            raise ValueError(f"{folder} has no weights for {missing[0]} and {len(missing) - 1} more: save it again")
        model.set_attn_implementation(ATTENTION)
        self.model = model.to(self.device).eval()
        config = model.config
        attends_to_all(config, folder)
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is None:
            raise ValueError(f"{folder} is of type {config.model_type}, which has no rotary position embedding")
        depends_on_length(rotary.rope_type, folder)
        self.rope = Rope(rotary.inv_freq.cpu().double().numpy(), float(rotary.attention_scaling))
        attention = model.base_model.layers[0].self_attn
        self.scaling = float(attention.scaling)
        self.shape = ModelShape(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            attention.head_dim,
            config.vocab_size,
        )
        can_be_unrotated(self, folder)

    @staticmethod
    def place(device: str, dtype: str) -> tuple[str, str]:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return device, dtype

    def _settle(self, device: str, dtype: str, cache_dtype: str) -> None:
        """Where and in what it computes."""
        device, dtype = self.place(device, dtype)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={device} needs a CUDA build of torch and a GPU: set device=cpu")
        self.device = torch.device(device)
        self.dtype, self.cache_dtype = getattr(torch, dtype), getattr(torch, cache_dtype)

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=self.device)[None]

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, position: int, cache: Cache, last: int) -> torch.Tensor:
        """Logits `[batch, last, vocabulary]` (all of them if `last` is 0) of `ids` `[batch, tokens]` at `position`."""
        positions = torch.arange(position, position + ids.shape[1], device=self.device)[None]
        return self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last
        ).logits

    def prefill(self, tokens: np.ndarray, observe: int) -> Prefill:
        cache = DynamicCache()
        with _observing() as observed:
            logits = self._forward(self._ids(tokens), 0, cache, last=1)[0, -1]
        return Prefill(
            np.asarray(tokens),
            [layer.keys[0].to(self.cache_dtype) for layer in cache.layers],
            [layer.values[0].to(self.cache_dtype) for layer in cache.layers],
            [observed[i][:, observed[i].shape[1] - observe :].clone() for i in range(self.shape.layers)],
            logits,
        )

    @torch.inference_mode()
    def compress(
        self, prefill: Prefill, kept: list[torch.Tensor] | None, storage: Storage, batch: int = 1
    ) -> CompressedCache:
        layers, positions = [], []
        for index, (keys, values) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
            if kept is None:
                keys, values = keys.clone(), values.clone()
                positions.append(np.tile(prefill.positions[index], (len(keys), 1)))
            else:
                keys, values = rows(keys, kept[index]), rows(values, kept[index])
                positions.append(to_numpy(kept[index]))
            keys, values = (x.repeat(batch, 1, 1, 1) if batch > 1 else x[None] for x in (keys, values))
            layers.append(CompressedLayer(storage.store(keys, values, index), self.cache_dtype))
        return CompressedCache(layers, len(prefill.tokens), positions, batch)

    def contents(self, cache: CompressedCache) -> Contents:
        loaded = [[x[0] for x in layer.stored.load()] for layer in cache.layers]
        return Contents(
            [keys for keys, _ in loaded],
            [values for _, values in loaded],
            [cache.positions(layer) for layer in range(len(loaded))],
        )

    @torch.inference_mode()
    def recompress(self, cache: CompressedCache, kept: list[torch.Tensor]) -> CompressedCache:
        layers = [
            CompressedLayer(layer.stored.take(chosen[None]), layer.cache_dtype)
            for layer, chosen in zip(cache.layers, kept, strict=True)
        ]
        positions = [
            np.take_along_axis(cache.positions(layer), to_numpy(chosen), axis=1) for layer, chosen in enumerate(kept)
        ]
        return CompressedCache(layers, cache.position, positions)

    def extend(self, cache: CompressedCache, tokens: np.ndarray) -> Extension:
        with _observing() as observed:
            logits = self._forward(self._ids(tokens), cache.position, cache, last=0)[0]
        cache.position += len(tokens)
        return Extension(logits, [observed[i] for i in range(self.shape.layers)])

    def grow(self, cache: CompressedCache, tokens: int) -> None:
        shape = (cache.batch, self.shape.kv_heads, tokens, self.shape.dim)
        zeros = torch.zeros(shape, device=self.device, dtype=self.dtype)
        for layer in cache.layers:
            layer.update(zeros, zeros)
        cache.position += tokens

    @torch.inference_mode()
    def project(self, layer: int, outputs: torch.Tensor) -> torch.Tensor | None:
        projection = getattr(self.model.base_model.layers[layer].self_attn, "o_proj", None)
        if projection is None:
            return None
        joined = outputs.permute(1, 0, 2).flatten(1)
        return projection(joined.to(self.dtype)).float()

    def generate(self, cache: CompressedCache, token: int, count: int) -> list[int]:
        ids = torch.full((cache.batch, 1), token, device=self.device)
        generated = []
        for _ in range(count):  # tokens stay on the device, so that steps can be queued
            ids = self._forward(ids, cache.position, cache, last=1).argmax(dim=-1)
            cache.position += 1
            generated.append(ids[0, 0])
        return torch.stack(generated).tolist() if generated else []

    def other_kernel(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH)

    def peak_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def synchronize(self, *results: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
