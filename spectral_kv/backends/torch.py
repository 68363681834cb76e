"""The torch backend: any full-attention causal model of transformers, on CPU or CUDA."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.logging import disable_progress_bar

from spectral_kv.backends.base import Contents, Extension, ModelShape, Prefill, Reread, Watch
from spectral_kv.backends.suitable import attends_to_all, can_be_unrotated, depends_on_length
from spectral_kv.backends.torch_cache import CompressedCache, CompressedLayer
from spectral_kv.backends.torch_generation import fed
from spectral_kv.backends.torch_runs import RunsLayer, read, split
from spectral_kv.backends.unplanned import SHORT, unplanned
from spectral_kv.engine.decoding import Engine, engine_of
from spectral_kv.heads import Heads, runs, taken, uneven
from spectral_kv.refit import Refitted
from spectral_kv.rope import Rope
from spectral_kv.selection import Budget
from spectral_kv.storage.base import Storage
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.xp import rows, to_numpy

ATTENTION = "spectral_kv"

_suitable: WeakSet[PreTrainedModel] = WeakSet()  # models whose rotation has been seen

_observer: ContextVar["Observer | None"] = ContextVar("observer", default=None)


class Observer:
    """What is left of the queries of a forward pass, or of several that follow one another.

    Parameters
    ----------
    layers : int
    tokens : int
        How many are going to be fed.
    last : int
        How many of the last tokens' queries are remembered.
    watch : function, optional
        Sees those of all tokens, as they come: see `spectral_kv.backends.base.Watch`.
    dtype : torch.dtype, optional
        Of the keys and values that `watch` sees.
    """

    def __init__(self, layers: int, tokens: int, last: int, watch: Watch | None = None, dtype=None):
        self.first, self.watch, self.dtype = tokens - last, watch, dtype  # the first token that is remembered
        self.seen = [0] * layers
        self.remembered: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def see(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rotated queries `[query_heads, tokens, dim]` of new tokens, keys and values of all up to them."""
        start, self.seen[layer] = self.seen[layer], self.seen[layer] + queries.shape[1]
        if self.watch is not None:
            self.watch(layer, queries, keys.to(self.dtype), values.to(self.dtype))
        forgotten = max(self.first - start, 0)
        # a copy, as a slice would keep all of them alive
        self.remembered[layer].append(queries[:, forgotten:].clone() if forgotten else queries)

    def queries(self) -> list[torch.Tensor]:
        """Those remembered, `[query_heads, last, dim]`, one a layer."""
        return [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in self.remembered]


def _uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that `torch.compile` must leave alone.

    As a decorator `torch.compiler.disable` would import the compiler, which takes seconds, whether it is used or not.
    """
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def _observing_attention(module, query, key, value, attention_mask, **kwargs):
    """SDPA that shows the rotated queries to whoever is watching, and tells a fed cache layer when it was read."""
    observer = _observer.get()
    if observer is not None:
        observer.see(module.layer_idx, query[0], key[0], value[0])
    if (apart := read.get()) is not None:
        read.set(None)  # first, so that no error leaves it to the next forward pass
        return apart.attend(query, kwargs.get("scaling")), None
    layer = fed.get()
    if layer is not None:
        fed.set(None)  # first, so that no error leaves it to the next forward pass
        attention_mask = _uncompiled(layer.mask, query, attention_mask)
    decodes = layer is not None and query.shape[2] == 1 and not torch.compiler.is_compiling()
    with unplanned() if decodes else nullcontext():
        result = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if layer is not None:
        _uncompiled(layer.attended, query, attention_mask)
    return result


AttentionInterface.register(ATTENTION, _observing_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class TorchBackend:
    """A causal language model of transformers.

    `TorchBackend.wrap` is for a model that is there already.

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
    engine : str
        How tokens are decoded: `auto`, `eager` or `graph`, see `spectral_kv.engine.decoding.Engine`.

    Raises
    ------
    ValueError
        If the model has layers that do not attend to all tokens, or a rotation that depends on the length of the
        prompt.
    """

    def __init__(
        self,
        folder: str,
        device: str = "auto",
        dtype: str = "auto",
        cache_dtype: str = "bfloat16",
        engine: str = "auto",
    ):
        self._settle(device, dtype, cache_dtype)
        disable_progress_bar()
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
            raise ValueError(f"{folder} has no weights for {missing[0]} and {len(missing) - 1} more: save it again")
        self._adopt(model.to(self.device).eval(), folder, engine)

    @classmethod
    def wrap(cls, model: PreTrainedModel, cache_dtype: str | None = None, engine: str = "auto") -> "TorchBackend":
        """A backend around a model that is loaded already, where and in what dtype it is.

        Nothing of the model changes but, while this backend runs it, how attention is computed.

        Parameters
        ----------
        cache_dtype : str, optional
            Of cached keys and values; by default that of the model.
        engine : str
            How tokens are decoded, as for a folder.
        """
        backend = cls.__new__(cls)
        backend.device, backend.dtype = model.device, model.dtype
        backend.cache_dtype = getattr(torch, cache_dtype) if cache_dtype else model.dtype
        backend._adopt(model, f"the {type(model).__name__}", engine)
        return backend

    def _adopt(self, model: PreTrainedModel, name: str, engine: str) -> None:
        """Take a model that suits; refuse any other."""
        self.model, config = model, model.config
        attends_to_all(config, name)
        rotary = getattr(model.base_model, "rotary_emb", None)
        if rotary is None:
            raise ValueError(f"{name} is of type {config.model_type}, which has no rotary position embedding")
        depends_on_length(rotary.rope_type, name)
        self.rope = Rope(rotary.inv_freq.cpu().double().numpy(), float(rotary.attention_scaling))
        attention = getattr(next(iter(getattr(model.base_model, "layers", ())), None), "self_attn", None)
        if not (hasattr(attention, "scaling") and hasattr(attention, "head_dim")):
            raise ValueError(f"{name} is of type {config.model_type}, whose attention can't be observed")
        self.scaling = float(attention.scaling)
        self.shape = ModelShape(
            config.num_hidden_layers,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            attention.head_dim,
            config.vocab_size,
        )
        if model not in _suitable:
            can_be_unrotated(self, name)
            _suitable.add(model)
        self.engine = engine_of(model, engine)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer of the model is now, which may be spread over several devices."""
        return next(self.model.base_model.layers[layer].self_attn.parameters()).device

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

    @contextmanager
    def _observing(self, tokens: int, last: int, watch: Watch | None = None) -> Iterator[Observer]:
        """While it lasts, the model computes attention by `ATTENTION`, and an observer sees the queries."""
        observer = Observer(self.shape.layers, tokens, last, watch, self.cache_dtype)
        config = self.model.config
        token, before = _observer.set(observer), config._attn_implementation
        config._attn_implementation = ATTENTION  # `set_attn_implementation` takes a millisecond
        try:
            yield observer
        finally:
            config._attn_implementation = before
            _observer.reset(token)

    @contextmanager
    def _attending(self, cache: Cache) -> Iterator[None]:
        """While it lasts, the model computes attention by `ATTENTION` if the cache needs it."""
        config = self.model.config
        before = config._attn_implementation
        if isinstance(cache.layers[0], RunsLayer):
            config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, cache: Cache, last: int) -> torch.Tensor:
        """Logits `[batch, last, vocabulary]` (all of them if `last` is 0) of `ids` `[batch, tokens]` after a cache."""
        continues = isinstance(cache, CompressedCache) and ids.shape[1] <= SHORT
        with unplanned() if continues else nullcontext():
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits

    def prefill(
        self, tokens: np.ndarray, observe: int, chunk: int | None = None, watch: Watch | None = None
    ) -> Prefill:
        tokens = np.asarray(tokens)
        cache = DynamicCache()
        with self._observing(len(tokens), observe, watch) as observer:
            for part in np.split(tokens, range(chunk, len(tokens), chunk) if chunk else []):
                logits = self._forward(self._ids(part), cache, last=1)[0, -1]
        keys, values = [], []
        for layer in cache.layers:  # one by one: the model's own and those in the cache's dtype never live together
            keys.append(layer.keys[0].to(self.cache_dtype))
            values.append(layer.values[0].to(self.cache_dtype))
            layer.keys = layer.values = None
        return Prefill(tokens, keys, values, observer.queries(), logits)

    @torch.inference_mode()
    def compress(
        self,
        prefill: Prefill,
        kept: list[Heads] | None,
        storage: Storage,
        batch: int = 1,
        refitted: list[Refitted] | None = None,
    ) -> CompressedCache:
        if hasattr(storage, "store_together"):
            return self._compress_together(prefill, kept, storage, batch)
        together = isinstance(kept, torch.Tensor)
        if (kept is not None and not together and uneven(kept)) or refitted is not None:
            return self._compress_runs(prefill, kept, storage, batch, refitted)
        if kept is None:
            contents = [(k[None].clone(), v[None].clone()) for k, v in zip(prefill.keys, prefill.values, strict=True)]
            positions = [np.tile(p, (self.shape.kv_heads, 1)) for p in prefill.positions]
        else:
            kept = kept if together else torch.stack(kept)
            contents = self._taken(prefill, kept)
        if kept is not None:
            host = torch.empty(kept.shape, dtype=torch.int64, pin_memory=kept.is_cuda)  # pages that are there
            positions = host.numpy()
        made = self._layers(prefill, contents, positions, storage, batch)
        if kept is not None:
            host.copy_(kept)  # one question to the device, when all else is done
        return made

    def select_and_compress(
        self, prefill: Prefill, scores: Any, budget: Budget, storage: Storage, batch: int = 1
    ) -> tuple[CompressedCache, torch.Tensor] | None:
        if isinstance(scores, list) or not prefill.keys[0].is_cuda or not find_spec("triton"):
            return None
        if hasattr(storage, "store_together"):
            return None
        from spectral_kv.engine.compaction import kept

        found = kept(scores, prefill.keys, prefill.values, budget)
        if found is None:
            return None
        made = self._layers(prefill, zip(found.keys, found.values, strict=True), found.positions, storage, batch)
        found.wait()  # when all else is done
        return made, found.tokens

    def _layers(self, prefill: Prefill, contents: Iterable, positions: Any, storage: Storage, batch: int):
        """A cache of keys and values `[1, kv_heads, kept, dim]`, pairs of every layer, from `positions` of each."""
        if batch > 1:
            contents = [tuple(x.repeat(batch, 1, 1, 1) for x in pair) for pair in contents]
        stored = [storage.store(*pair, index) for index, pair in enumerate(contents)]
        layers = [
            CompressedLayer(one, self.cache_dtype, len(prefill.tokens), own)
            for one, own in zip(stored, positions, strict=True)
        ]
        return CompressedCache(layers, batch)

    def _compress_runs(
        self, prefill: Prefill, kept: list[Heads], storage: Storage, batch: int, refitted: list[Refitted] | None
    ) -> CompressedCache:
        """`compress` where layers or heads keep different numbers of tokens, or more than these: every run apart."""
        layers = []
        for index, (keys, values) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
            given = None if refitted is None else refitted[index]
            of_kept = taken(values, kept[index]) if given is None or given.values is None else given.values
            made = []
            for _, (chosen, *pair) in runs(kept[index], taken(keys, kept[index]), of_kept):
                stored = storage.store(*(x.expand(batch, *x.shape).contiguous() for x in pair), index)
                made.append(CompressedLayer(stored, self.cache_dtype, len(prefill.tokens), to_numpy(chosen)))
            layers.append(RunsLayer(made, given and [bias for _, (bias,) in runs(given.bias)]))
        return CompressedCache(layers, batch)

    def _taken(self, prefill: Prefill, kept: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Kept keys and values `[1, kv_heads, kept, dim]` of every layer."""
        if prefill.keys[0].is_cuda and find_spec("triton"):
            from spectral_kv.engine.scoring import kept_rows, suits

            if suits(prefill.keys) and suits(prefill.values):
                taken = kept_rows(prefill.keys, prefill.values, kept).unbind()
                return list(zip(taken[: len(kept)], taken[len(kept) :], strict=True))
        triples = zip(prefill.keys, prefill.values, kept, strict=True)
        return [(rows(keys, chosen)[None], rows(values, chosen)[None]) for keys, values, chosen in triples]

    def _compress_together(self, prefill: Prefill, kept, storage: Storage, batch: int) -> CompressedCache:
        """`compress` with a storage that codes layers in common."""
        if kept is not None:
            raise ValueError(f"{type(storage).__name__} keeps every token: choose no scorer, or another storage")
        held = ([x.expand(batch, *x.shape) for x in part] for part in (prefill.keys, prefill.values))
        tokens = len(prefill.tokens)
        stored = storage.store_together(*held, np.arange(tokens), tokens, self.rope)
        positions = np.tile(np.arange(tokens), (self.shape.kv_heads, 1))
        return CompressedCache([CompressedLayer(x, self.cache_dtype, tokens, positions) for x in stored], batch)

    def contents(self, cache: CompressedCache) -> Contents:
        if isinstance(cache.layers[0], RunsLayer):
            return self._contents_of_runs(cache)
        loaded = [[x[0] for x in layer.stored.load()] for layer in cache.layers]
        return Contents(
            [keys for keys, _ in loaded],
            [values for _, values in loaded],
            [layer.positions for layer in cache.layers],
        )

    def _contents_of_runs(self, cache: CompressedCache) -> Contents:
        """`contents` of layers in runs: a list of heads where there are several runs."""
        parts: list[list[Heads]] = [[], [], [], []]
        for layer in cache.layers:
            for part, found in zip(parts, layer.contents(), strict=True):
                part.append(found and (found[0] if len(layer.runs) == 1 else [x[0] for x in found]))
        keys, values, positions, bias = parts
        return Contents(keys, values, positions, None if bias[0] is None else bias)

    @torch.inference_mode()
    def recompress(self, cache: CompressedCache, kept: list[Heads]) -> CompressedCache:
        if isinstance(cache.layers[0], RunsLayer):
            chosen = [[own for _, (own,) in runs(of_layer)] for of_layer in kept]
            pairs = zip(cache.layers, chosen, strict=True)
            return CompressedCache([layer.take(own, cache.batch) for layer, own in pairs], cache.batch)
        if uneven(kept):
            pairs = zip(cache.layers, kept, strict=True)
            return CompressedCache([split(layer, chosen, cache.batch) for layer, chosen in pairs], cache.batch)
        layers = []
        for layer, chosen in zip(cache.layers, kept, strict=True):
            positions = np.take_along_axis(layer.positions, to_numpy(chosen), axis=1)
            same = chosen.expand(cache.batch, *chosen.shape)
            layers.append(CompressedLayer(layer.stored.take(same), layer.cache_dtype, layer.seen, positions))
        return CompressedCache(layers, cache.batch)

    def extend(self, cache: CompressedCache, tokens: np.ndarray) -> Extension:
        ids = self._ids(tokens).expand(cache.batch, -1)
        with self._observing(len(tokens), len(tokens)) as observer:
            logits = self._forward(ids, cache, last=0)[0]
        return Extension(logits, observer.queries())

    @torch.inference_mode()
    def reread(self, prefill: Prefill, tokens: np.ndarray, watch: Reread) -> None:
        seen = len(prefill.tokens)
        positions = np.tile(np.arange(seen), (self.shape.kv_heads, 1))
        layers = [  # they make buffers of their own when they grow
            CompressedLayer(DenseTokens(k[None], v[None]), self.cache_dtype, seen, positions)
            for k, v in zip(prefill.keys, prefill.values, strict=True)
        ]
        lengths: dict[int, torch.Tensor] = {}

        def entered(layer: int, hidden: torch.Tensor) -> None:
            lengths[layer] = hidden[0].float().norm(dim=-1)

        def attends(layer: int, *seen: torch.Tensor) -> tuple[()]:
            watch(layer, *seen, lengths[layer])
            layers[layer].hold(DenseTokens(*(x[:, :, :0].clone() for x in layers[layer].stored.load())), 0)  # let go
            return ()

        hooks = [
            block.register_forward_pre_hook(
                lambda _, args, kwargs, layer=index: entered(layer, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for index, block in enumerate(self.model.base_model.layers)
        ]
        try:
            with self._observing(len(tokens), 0, attends):
                self._forward(self._ids(tokens), CompressedCache(layers), last=1)
        finally:
            for hook in hooks:
                hook.remove()

    def output_weights(self, layer: int) -> torch.Tensor | None:
        weight = getattr(getattr(self.model.base_model.layers[layer].self_attn, "o_proj", None), "weight", None)
        return None if weight is None else weight.detach().T.unflatten(0, (self.shape.query_heads, -1)).float()

    def query_bias(self, layer: int) -> torch.Tensor | None:
        bias = getattr(getattr(self.model.base_model.layers[layer].self_attn, "q_proj", None), "bias", None)
        return None if bias is None else bias.detach().unflatten(0, (self.shape.query_heads, -1))

    def grow(self, cache: CompressedCache, tokens: int) -> None:
        shape = (cache.batch, self.shape.kv_heads, tokens, self.shape.dim)
        zeros = torch.zeros(shape, device=self.device, dtype=self.dtype)
        for layer in cache.layers:
            (layer.append if isinstance(layer, RunsLayer) else layer.update)(zeros, zeros)

    @torch.inference_mode()
    def project(self, layer: int, outputs: torch.Tensor) -> torch.Tensor | None:
        projection = getattr(self.model.base_model.layers[layer].self_attn, "o_proj", None)
        if projection is None:
            return None
        joined = outputs.permute(1, 0, 2).flatten(1)
        return projection(joined.to(self.dtype)).float()

    def generate(self, cache: CompressedCache, token: int, count: int) -> list[int]:
        ids = torch.full((cache.batch, 1), token, device=self.device)
        if self.engine.reason(cache.layers) is None:
            return self.engine.generate(cache.layers, ids[:, 0], count)[:, 0].tolist()
        with self._attending(cache):
            return self._generated(cache, ids, count)

    def _generated(self, cache: CompressedCache, ids: torch.Tensor, count: int) -> list[int]:
        generated = []
        for _ in range(count):  # tokens stay on the device, so that steps can be queued
            ids = self._forward(ids, cache, last=1).argmax(dim=-1)
            generated.append(ids[0, 0])
        return torch.stack(generated).tolist() if generated else []

    def ready(self, cache: CompressedCache, tokens: int) -> None:
        if self.steps(cache):
            self.engine.ready(cache.layers, tokens)
        else:
            cache.reserve(tokens)

    def steps(self, cache: CompressedCache) -> bool:
        return self.engine.reason(cache.layers) is None

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        engine, self.engine = self.engine, Engine(self.model, "eager")
        try:
            yield
        finally:
            self.engine = engine

    def floor_seconds(self, cache: CompressedCache) -> float:
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        weights = sum(p.nbytes for p in self.model.parameters())
        if head is not None and head.weight is not embedding.weight:
            weights -= embedding.weight.nbytes  # a step reads a row of it
        return (weights + cache.nbytes) / self._copy_bandwidth

    @cached_property
    def _copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy that no cache holds."""
        source = torch.ones(1 << (29 if self.device.type == "cuda" else 25), dtype=torch.float32, device=self.device)
        target, seconds = torch.empty_like(source), []
        for _ in range(5):
            self.synchronize()
            start = time.perf_counter()
            target.copy_(source)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * source.nbytes / float(np.median(seconds))

    @contextmanager
    def other_kernel(self) -> Iterator[None]:
        with self.eagerly(), sdpa_kernel(SDPBackend.MATH):
            yield

    def peak_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def synchronize(self, *results: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
