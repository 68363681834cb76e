"""The MLX backend: any full-attention causal model that mlx-lm knows, on Apple silicon, CUDA or CPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import load_model
from transformers import AutoConfig

from spectral_kv.backends.base import Contents, Extension, ModelShape, Prefill, Reread, Watch
from spectral_kv.backends.mlx_cache import CompressedCache, CompressedLayer
from spectral_kv.backends.mlx_rope import flattened, make_exact, rotation
from spectral_kv.backends.suitable import attends_to_all, can_be_unrotated
from spectral_kv.refit import Refitted
from spectral_kv.selection import Budget
from spectral_kv.storage.base import Storage
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import rows, to_numpy

CHUNK = 512  # tokens fed at once: CPUs write out the attention scores of a whole chunk
ATTENTION = "scaled_dot_product_attention"  # what the models of mlx-lm call, by this name in their own modules


def explicit_attention(queries, keys, values, cache, scale: float, mask, sinks=None) -> mx.array:
    """Unfused attention in float32 that divides by the sum of the weights last.

    Where there is no fused kernel, MLX divides first: softmax, then the product with the values.
    """
    batch, heads, tokens, dim = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, tokens, dim).astype(mx.float32)
    keys, values = (x[:, :, None].astype(mx.float32) for x in (keys, values))
    logits = (grouped * scale) @ keys.swapaxes(-1, -2)
    if mask is not None:  # "causal", the only mask there is without sliding windows
        size = logits.shape[-1]
        logits = mx.where(mx.arange(size) <= mx.arange(size - tokens, size)[:, None], logits, -mx.inf)
    weights = mx.exp(logits - mx.max(logits, axis=-1, keepdims=True))
    output = (weights @ values) / mx.sum(weights, axis=-1, keepdims=True)
    return output.reshape(batch, heads, tokens, -1).astype(queries.dtype)


class MLXBackend:
    """A causal language model of mlx-lm.

    Parameters
    ----------
    folder : str
        A Hugging Face checkpoint: config.json and safetensors, quantised by mlx-lm or not. Nothing is downloaded and no
        code of the checkpoint runs.
    device : str
        `cpu`, `gpu` (Metal or CUDA), or `auto` for the GPU where there is one. It holds for all of MLX in the process.
    dtype : str
        Of weights and arithmetic: `float32`, `bfloat16`, `float16`, or `auto` for float32 on CPU and bfloat16 on a GPU.
    cache_dtype : str
        Of cached keys and values.

    Raises
    ------
    ValueError
        If the model has layers that do not attend to all tokens, a rotation that depends on the length of the prompt or
        that mlx-lm understands in another way than transformers, or attention that can't be observed.
    """

    def __init__(self, folder: str, device: str = "auto", dtype: str = "auto", cache_dtype: str = "bfloat16"):
        device, dtype = self.place(device, dtype)
        if device == "gpu" and not mx.is_available(mx.gpu):
            raise ValueError("device=gpu needs Apple silicon or MLX for CUDA: set device=cpu")
        mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
        if device == "cpu":  # it would run g++ and leave what that makes in a folder that all users share
            mx.disable_compile()
        self.dtype, self.cache_dtype = getattr(mx, dtype), getattr(mx, cache_dtype)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        attends_to_all(config, folder)
        self.rope = rotation(config, folder)
        # Most models of mlx-lm tie where a configuration does not say, some models of transformers don't
        settings = flattened(config) | {"tie_word_embeddings": config.tie_word_embeddings}
        try:
            self.model, _ = load_model(Path(folder), model_config=settings)
        except (RuntimeError, TypeError, KeyError) as error:  # damaged weights, settings that mlx-lm misses
            raise ValueError(f"mlx-lm can't load {folder}: {error}") from None
        self.model.set_dtype(self.dtype)
        mx.eval(self.model.parameters())
        make_exact(self.model.layers, self.rope, folder)
        attention = self.model.layers[0].self_attn
        self._module = sys.modules[type(attention).__module__]
        self.scaling = float(attention.scale)
        heads = config.num_attention_heads
        self.shape = ModelShape(
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )
        try:
            can_be_unrotated(self, folder)
        except (AttributeError, KeyError):  # attention of another name, or one that is called without the cache
            raise ValueError(
                f"{folder} is of type {config.model_type}, whose attention can't be observed in mlx-lm: "
                "use the torch backend"
            ) from None

    @staticmethod
    def place(device: str, dtype: str) -> tuple[str, str]:
        if device == "auto":
            device = "gpu" if mx.is_available(mx.gpu) else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        return device, dtype

    @contextmanager
    def _attending(self, function: Callable) -> Iterator[None]:
        """While it lasts, the model's module calls `function` for attention."""
        before = getattr(self._module, ATTENTION)
        setattr(self._module, ATTENTION, function)
        try:
            yield
        finally:
            setattr(self._module, ATTENTION, before)

    @contextmanager
    def _observing(self, layers: list, watch: Watch | None = None) -> Iterator[dict]:
        """Rotated queries `[query_heads, tokens, dim]` of the last forward pass, by the index of the layer's cache.

        `watch` sees them as they come, with keys and values so far; what it returns is there under `("watch", index)`.
        """
        observed = {}
        index = {id(layer): i for i, layer in enumerate(layers)}
        attend = getattr(self._module, ATTENTION)

        def function(queries, keys, values, cache=None, **kwargs):
            layer = index[id(cache)]
            observed[layer] = queries[0]
            if watch is not None:
                held = (x[0].astype(self.cache_dtype) for x in (keys, values))
                observed["watch", layer] = watch(layer, queries[0], *held)
            return attend(queries, keys, values, cache=cache, **kwargs)

        with self._attending(function):
            yield observed

    def _ids(self, tokens: np.ndarray) -> mx.array:
        return mx.array(np.asarray(tokens, dtype=np.int32))[None]

    def _feed(
        self, tokens: np.ndarray, layers: list, observe: int, chunk: int = CHUNK, watch: Watch | None = None
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Run `tokens` in chunks: logits `[chunk, vocabulary]` of every chunk, and each layer's last `observe` queries.

        What a chunk adds to the cache is computed before the next; logits only when somebody looks at them.
        """
        logits: list[mx.array] = []
        seen: list[list[mx.array]] = [[] for _ in layers]
        for start in range(0, len(tokens), chunk):
            ids = self._ids(tokens[start : start + chunk])
            stop = start + ids.shape[1]
            with self._observing(layers, watch) as observed:
                logits.append(self.model(ids, cache=layers)[0])
            unseen = max(len(tokens) - observe - start, 0)
            if stop > start + unseen:
                for index, queries in enumerate(seen):
                    queries.append(mx.contiguous(observed[index][:, unseen:]))
            gathered = [observed["watch", i] for i in range(len(layers))] if watch else []
            mx.eval([layer.state for layer in layers], [queries[-1:] for queries in seen], gathered)
        empty = mx.zeros((self.shape.query_heads, 0, self.shape.dim), self.dtype)
        return logits, [mx.concatenate(queries, axis=1) if queries else empty for queries in seen]

    def prefill(
        self, tokens: np.ndarray, observe: int, chunk: int | None = None, watch: Watch | None = None
    ) -> Prefill:
        tokens, chunk = np.asarray(tokens), chunk or CHUNK
        layers = [KVCache() for _ in range(self.shape.layers)]
        # The last token goes alone: only its logits are wanted, and mlx-lm computes those of every token it is fed
        _, before = self._feed(tokens[:-1], layers, max(observe - 1, 0), chunk, watch)
        logits, last = self._feed(tokens[-1:], layers, min(observe, 1), chunk, watch)
        held = [
            [mx.contiguous(x[0, :, : len(tokens)].astype(self.cache_dtype)) for x in (layer.keys, layer.values)]
            for layer in layers  # of buffers with room to grow
        ]
        prefill = Prefill(
            tokens,
            [keys for keys, _ in held],
            [values for _, values in held],
            [mx.concatenate(pair, axis=1) for pair in zip(before, last, strict=True)],
            logits[-1][-1],
        )
        mx.eval(prefill.keys, prefill.values, prefill.queries, prefill.logits)
        return prefill

    def compress(
        self,
        prefill: Prefill,
        kept: list[mx.array] | None,
        storage: Storage,
        batch: int = 1,
        refitted: list[Refitted] | None = None,
    ) -> CompressedCache:
        if refitted is not None or any(isinstance(x, list) for x in kept or ()):
            raise ValueError("heads of different lengths, and a bias, need the torch backend")
        layers = []
        for index, (keys, values) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
            if kept is None:
                positions = np.tile(prefill.positions[index], (len(keys), 1))
            else:
                keys, values = rows(keys, kept[index]), rows(values, kept[index])
                positions = to_numpy(kept[index])
            keys, values = (mx.repeat(x[None], batch, axis=0) for x in (keys, values))
            stored = storage.store(keys, values, index)
            layers.append(CompressedLayer(stored, self.cache_dtype, len(prefill.tokens), positions))
        mx.eval([layer.state for layer in layers])  # a cache that waits to be computed keeps the whole prefill alive
        return CompressedCache(layers, batch)

    def select_and_compress(self, prefill: Prefill, scores: Any, budget: Budget, storage: Storage, batch: int = 1):
        return None

    def contents(self, cache: CompressedCache) -> Contents:
        loaded = [[x[0] for x in layer.stored.load()] for layer in cache.layers]
        return Contents(
            [keys for keys, _ in loaded],
            [values for _, values in loaded],
            [layer.positions for layer in cache.layers],
        )

    def recompress(self, cache: CompressedCache, kept: list[mx.array]) -> CompressedCache:
        layers = []
        for layer, chosen in zip(cache.layers, kept, strict=True):
            positions = np.take_along_axis(layer.positions, to_numpy(chosen).astype(np.int64), axis=1)
            layers.append(CompressedLayer(layer.stored.take(chosen[None]), layer.dtype, layer.offset, positions))
        mx.eval([layer.state for layer in layers])
        return CompressedCache(layers)

    def extend(self, cache: CompressedCache, tokens: np.ndarray) -> Extension:
        logits, queries = self._feed(np.asarray(tokens), cache.layers, len(tokens))
        extension = Extension(mx.concatenate(logits), queries)
        mx.eval(extension.logits, extension.queries)
        return extension

    def reread(self, prefill: Prefill, tokens: np.ndarray, watch: Reread) -> None:
        layers = self.compress(prefill, None, Dense()).layers
        entered: list[mx.array] = []
        block = type(self.model.layers[0])
        call = block.__call__

        def called(layer, x, *args, **kwargs):
            entered.append(mx.linalg.norm(x[0].astype(mx.float32), axis=-1))
            return call(layer, x, *args, **kwargs)

        block.__call__ = called
        try:  # at once: what is fed sees itself, and a chunk would hide its end from its beginning
            with self._observing(layers, lambda layer, *seen: watch(layer, *seen, entered[-1])):
                mx.eval(self.model(self._ids(tokens), cache=layers)[0, -1])
        finally:
            block.__call__ = call

    def output_weights(self, layer: int) -> mx.array | None:
        heads, dim = self.shape.query_heads, self.shape.dim
        each = mx.eye(heads * dim).reshape(heads * dim, heads, dim).transpose(1, 0, 2)
        outputs = self.project(layer, each)  # whatever holds the weights, and in how many bits
        return None if outputs is None else (outputs - self.project(layer, 0 * each)).reshape(heads, dim, -1)

    def query_bias(self, layer: int) -> mx.array | None:
        projection = getattr(self.model.layers[layer].self_attn, "q_proj", {})
        return projection["bias"].reshape(self.shape.query_heads, -1) if "bias" in projection else None

    def grow(self, cache: CompressedCache, tokens: int) -> None:
        zeros = mx.zeros((cache.batch, self.shape.kv_heads, tokens, self.shape.dim), self.dtype)
        for layer in cache.layers:
            layer.update_and_fetch(zeros, zeros)

    def project(self, layer: int, outputs: mx.array) -> mx.array | None:
        projection = getattr(self.model.layers[layer].self_attn, "o_proj", None)
        if projection is None:
            return None
        joined = outputs.transpose(1, 0, 2).reshape(outputs.shape[1], -1)
        return projection(joined.astype(self.dtype)).astype(mx.float32)

    def generate(self, cache: CompressedCache, token: int, count: int) -> list[int]:
        ids = mx.full((cache.batch, 1), token, dtype=mx.int32)
        generated = []
        for _ in range(count):
            ids = mx.argmax(self.model(ids, cache=cache.layers)[:, -1:], axis=-1)
            mx.async_eval(ids)  # the next step is prepared meanwhile
            generated.append(ids[0, 0])
        return [int(x) for x in generated]

    def other_kernel(self) -> AbstractContextManager:
        return self._attending(explicit_attention)

    def ready(self, cache: Any, tokens: int) -> None:
        cache.reserve(tokens)

    def steps(self, cache: Any) -> bool:
        return False

    def eagerly(self) -> AbstractContextManager:
        return nullcontext()

    def floor_seconds(self, cache: Any) -> None:
        return None

    def peak_bytes(self) -> int:
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak

    def synchronize(self, *results: Any) -> None:
        mx.eval(*results)
        mx.synchronize()
