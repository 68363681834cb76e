"""The MLX backend does what the torch backend does, on a Qwen2 and on a Llama with scaled RoPE."""

import gc
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from spectral_kv.backends import mlx as mlx_backend
from spectral_kv.backends.mlx import MLXBackend
from spectral_kv.backends.mlx_cache import CompressedLayer
from spectral_kv.backends.mlx_rope import ExactRope, make_exact
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage
from spectral_kv.xp import to_numpy

PROMPT, KEPT = 360, 90
BUDGET = Budget(KEPT, sinks=2, recent=8)


@pytest.fixture(scope="module", params=["checkpoint", "llama"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pair(folder) -> tuple[MLXBackend, TorchBackend]:
    """Both backends on one checkpoint, in float32, their caches too."""
    exact = {"device": "cpu", "dtype": "float32", "cache_dtype": "float32"}
    return MLXBackend(str(folder), **exact), TorchBackend(str(folder), **exact)


@pytest.fixture(scope="module")
def ours(pair) -> MLXBackend:
    return pair[0]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 8000, size=440)


@pytest.fixture(scope="module")
def prefills(pair, tokens):
    return [backend.prefill(tokens[:PROMPT], observe=32) for backend in pair]


def apart(found, expected) -> float:
    """Largest difference."""
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def views(backend, prefill) -> list[LayerView]:
    return [
        LayerView(
            prefill.keys[i], prefill.values[i], backend.rope, np.arange(PROMPT), BUDGET.evictable(PROMPT),
            scaling=backend.scaling, index=i, seed=(0, i), queries=prefill.queries[i],
        )
        for i in range(backend.shape.layers)
    ]  # fmt: skip


def chosen(sizes: list[int], heads: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Ascending random positions `[heads, size]` for every layer, other ones in every head."""
    rng = np.random.default_rng(seed)
    return [np.stack([np.sort(rng.permutation(PROMPT)[:size]) for _ in range(heads)]) for size in sizes]


# What mlx-lm has to keep doing


def test_the_functions_and_caches_of_mlx_lm_are_as_the_backend_expects(ours):
    names = list(inspect.signature(base.scaled_dot_product_attention).parameters)
    assert names[:6] == ["queries", "keys", "values", "cache", "scale", "mask"]
    assert list(inspect.signature(CompressedLayer.make_mask).parameters)[1:] == [
        "tokens",
        "window_size",
        "return_array",
    ]
    assert issubclass(CompressedLayer, mlx_lm_cache._BaseCache) and not hasattr(CompressedLayer, "bits")
    stock = mlx_lm_cache.KVCache()
    stock.update_and_fetch(mx.zeros((1, 2, 3, 16)), mx.zeros((1, 2, 3, 16)))
    assert stock.offset == 3 and stock.keys.shape[-2] >= 3 and len(stock.state) == 3


def test_attention_reads_the_offset_before_it_updates_and_the_mask_before_any_layer(ours, tokens):
    calls, within = [None], []

    class Watched(CompressedLayer):
        def update_and_fetch(self, *args):
            within.append(True)
            try:
                return super().update_and_fetch(*args)
            finally:
                within.pop()

        def __getattribute__(self, name):
            if name in ("offset", "update_and_fetch", "make_mask") and not within and calls[-1] != name:
                calls.append(name)
            return super().__getattribute__(name)

    prefill = ours.prefill(tokens[:20], observe=0)
    layers = ours.compress(prefill, None, Dense()).layers
    for layer in layers:
        layer.__class__ = Watched
    ours.model(mx.array(tokens[None, 20:24]), cache=layers)
    assert calls[1:] == ["make_mask", *["offset", "update_and_fetch"] * 2]


def test_the_attention_of_the_module_is_put_back(ours, tokens):
    before = ours._module.scaled_dot_product_attention
    with pytest.raises(ValueError), ours.other_kernel(), ours._observing([]):
        assert ours._module.scaled_dot_product_attention is not before
        raise ValueError
    assert ours._module.scaled_dot_product_attention is before


# Rotation


def test_a_model_that_ignores_its_rope_parameters_is_refused(folder, monkeypatch):
    """Without the settings under their old names mlx-lm builds the model with a base of its own and says nothing."""
    monkeypatch.setattr(mlx_backend, "flattened", lambda config: {})
    with pytest.raises(ValueError, match="other RoPE frequencies"):
        MLXBackend(str(folder), device="cpu")


def test_another_scaling_alone_is_refused(llama, monkeypatch):
    monkeypatch.setattr(mlx_backend, "flattened", lambda config: {"rope_theta": 500_000.0})
    with pytest.raises(ValueError, match="other RoPE frequencies"):
        MLXBackend(str(llama), device="cpu")


def test_settings_of_an_older_transformers_rotate_alike(llama, ours, tmp_path, tokens):
    """`rope_theta` and `rope_scaling` at the top level."""
    old = shutil.copytree(llama, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    (old / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    backends = [MLXBackend(str(path), device="cpu") for path in (llama, old)]
    np.testing.assert_array_equal(backends[0].rope.inv_freq, backends[1].rope.inv_freq)
    logits = [backend.prefill(tokens[:50], observe=0).logits for backend in backends]
    assert apart(*logits) == 0


def test_frequencies_are_those_of_the_torch_model(pair):
    np.testing.assert_array_equal(pair[0].rope.inv_freq, pair[1].rope.inv_freq)
    assert pair[0].rope.attention_scaling == pair[1].rope.attention_scaling
    assert (pair[0].scaling, pair[0].shape) == (pair[1].scaling, pair[1].shape)


@pytest.mark.parametrize("kind, settings", [("yarn", {"factor": 4.0}), ("linear", {"factor": 2.0})])
def test_other_scalings_give_the_logits_of_torch(llama, tmp_path, tokens, kind, settings):
    copy = shutil.copytree(llama, tmp_path / kind)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, **settings}
    if kind == "yarn":
        config["rope_parameters"]["original_max_position_embeddings"] = 128
    (copy / "config.json").write_text(json.dumps(config))
    one, other = (b(str(copy), device="cpu").prefill(tokens[:200], 8) for b in (MLXBackend, TorchBackend))
    assert apart(one.logits, other.logits) <= 1e-4
    assert apart(one.queries[1], other.queries[1]) <= 1e-4


def test_at_far_positions_exact_frequencies_matter(checkpoint, monkeypatch):
    far = np.random.default_rng(3).integers(2, 8000, size=2000)
    expected = TorchBackend(str(checkpoint), device="cpu", cache_dtype="float32").prefill(far, observe=0)
    exact = MLXBackend(str(checkpoint), device="cpu", cache_dtype="float32").prefill(far, observe=0)
    monkeypatch.setattr(mlx_backend, "make_exact", lambda *_: None)
    own = MLXBackend(str(checkpoint), device="cpu", cache_dtype="float32").prefill(far, observe=0)
    assert apart(exact.keys[0], expected.keys[0]) <= 2e-5 < apart(own.keys[0], expected.keys[0])
    assert apart(exact.logits, expected.logits) <= 1e-4
    assert apart(own.logits, expected.logits) <= 1e-3


# Prefill


def test_the_prefill_is_that_of_torch(prefills):
    one, other = prefills
    assert apart(one.logits, other.logits) <= 1e-4
    assert apart(one.values[0], other.values[0]) <= 1e-5
    for layer in range(2):
        for name in ("keys", "values", "queries"):
            assert apart(getattr(one, name)[layer], getattr(other, name)[layer]) <= 1e-4


def test_an_output_matrix_of_its_own_is_used_though_the_configuration_is_silent(checkpoint, tmp_path, tokens):
    """mlx-lm would tie it to the embeddings, transformers does not."""
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, tie_word_embeddings=False)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    one, other = (b(str(tmp_path), device="cpu").prefill(tokens[:50], 0).logits for b in (MLXBackend, TorchBackend))
    assert apart(one, other) <= 1e-3 < apart(one, TorchBackend(str(checkpoint)).prefill(tokens[:50], 0).logits)


def test_weights_that_mlx_lm_quantised_are_loaded(ours, folder, tmp_path, tokens):
    model, config = load_model(folder, model_config={"rope_theta": 1e4})
    model, config = quantize_model(model, config, group_size=32, bits=8)
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    backend = MLXBackend(str(tmp_path), device="cpu")
    assert isinstance(backend.model.layers[0].self_attn.q_proj, nn.QuantizedLinear)
    logits = [b.prefill(tokens[:50], 0).logits for b in (backend, ours)]
    assert 0 < apart(*logits) < 0.1 * np.ptp(to_numpy(logits[1]))


def test_one_token_is_a_prompt(pair, tokens):
    one, other = (b.prefill(tokens[:1], observe=1) for b in pair)
    assert apart(one.logits, other.logits) <= 1e-4 and one.queries[0].shape == (4, 1, 16)


def test_queries_are_observed_after_their_norm(tmp_path, tokens):
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            torch.nn.init.normal_(parameter, std=3.0)
    model.save_pretrained(tmp_path)
    one, other = (b(str(tmp_path), device="cpu").prefill(tokens[:200], 50) for b in (MLXBackend, TorchBackend))
    assert apart(one.logits, other.logits) <= 2e-4
    assert all(apart(*pair) <= 2e-4 for pair in zip(one.queries, other.queries, strict=True))


@pytest.mark.parametrize("observe", [0, 1, 70, 360])
def test_chunks_of_any_size_give_the_same_prefill(ours, tokens, monkeypatch, observe):
    whole = ours.prefill(tokens[:PROMPT], observe)
    monkeypatch.setattr(mlx_backend, "CHUNK", 64)
    parts = ours.prefill(tokens[:PROMPT], observe)
    assert apart(parts.logits, whole.logits) <= 1e-4
    for layer in range(2):
        assert whole.queries[layer].shape == (4, observe, 16)
        for name in ("keys", "values", "queries") if observe else ("keys", "values"):
            assert apart(getattr(parts, name)[layer], getattr(whole, name)[layer]) <= 1e-5


def test_a_cache_in_16_bits_is_the_rounded_one(folder, tokens):
    found, expected = (
        b(str(folder), device="cpu", cache_dtype="bfloat16").prefill(tokens[:100], observe=1)
        for b in (MLXBackend, TorchBackend)
    )
    assert found.keys[0].dtype == mx.bfloat16 and found.queries[0].dtype == mx.float32
    assert found.nbytes == expected.nbytes
    differing = [np.mean(to_numpy(a) != to_numpy(b)) for a, b in zip(found.keys, expected.keys, strict=True)]
    assert max(differing) < 0.01  # what lies between two numbers may go either way


# A cache with fewer rows than its position


@pytest.mark.parametrize("size", [KEPT, 20])
def test_the_same_kept_tokens_give_the_same_logits(pair, prefills, tokens, size):
    """A block right after pruning, then 20 tokens one by one; every head keeps other tokens."""
    kept = chosen([size, size])
    logits = []
    for backend, prefill, like in zip(pair, prefills, (mx.array, torch.from_numpy), strict=True):
        cache = backend.compress(prefill, [like(k) for k in kept], Dense())
        fed = [backend.extend(cache, tokens[PROMPT : PROMPT + 40]).logits]
        fed += [backend.extend(cache, tokens[t : t + 1]).logits for t in range(PROMPT + 40, PROMPT + 60)]
        assert cache.position == PROMPT + 60
        logits.append(np.concatenate([to_numpy(x) for x in fed]))
    assert apart(*logits) <= 5e-4
    full = pair[0].extend(pair[0].compress(prefills[0], None, Dense()), tokens[PROMPT : PROMPT + 60]).logits
    assert apart(full, logits[1]) > 0.1


@pytest.mark.parametrize("scorer", [Fourier(), Wavelet(), SnapKV(window=32), Random()])
def test_own_choices_agree(pair, prefills, scorer):
    scores, kept = [], []
    for backend, prefill in zip(pair, prefills, strict=True):
        found = [scorer.score(view) for view in views(backend, prefill)]
        scores.append([to_numpy(s) for s in found])
        kept.append([to_numpy(select(s, BUDGET)) for s in found])
    quota = KEPT - BUDGET.sinks - BUDGET.recent
    for layer in range(2):
        for head in range(2):
            one, other = (set(k[layer][head].tolist()) for k in kept)
            best = -np.sort(-scores[1][layer][head, BUDGET.evictable(PROMPT)])
            clear = best[quota - 1] - best[quota] > 1e-5 * np.ptp(best)
            assert len(one & other) == KEPT if clear else len(one & other) >= 0.99 * KEPT


def test_a_budget_that_holds_everything_changes_nothing(ours, prefills, tokens):
    everything = [mx.array(np.tile(np.arange(PROMPT), (2, 1)))] * 2
    for storage in (Dense(), TurboQuantStorage(recent=1000)):
        fed = [
            ours.extend(ours.compress(prefills[0], kept, s), tokens[PROMPT:]).logits
            for kept, s in ((None, Dense()), (everything, storage))
        ]
        assert apart(*fed) == 0


def hidden(backend: MLXBackend, kept: list[list[np.ndarray]], full: list):
    """Attention over a full cache, without the prompt's tokens that are not in `kept` `[layers][kv_heads]`."""
    allowed = np.zeros((len(kept), 2, PROMPT), dtype=bool)
    for layer, heads in enumerate(kept):
        for head, positions in enumerate(heads):
            allowed[layer, head, positions] = True
    attend = backend._module.scaled_dot_product_attention

    def function(queries, keys, values, cache, scale, mask):
        size, new = keys.shape[-2], queries.shape[-2]
        seen = np.tri(new, size, size - new, dtype=bool)[None].repeat(4, axis=0)
        seen[..., :PROMPT] &= allowed[full.index(cache)].repeat(2, axis=0)[:, None]
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mx.array(seen[None]))

    return backend._attending(function)


@pytest.mark.parametrize("sizes", [[KEPT, KEPT], [150, 30], [30, 150]], ids=["equal", "narrowing", "widening"])
def test_evicting_equals_masking_whatever_the_budget_of_a_layer(ours, prefills, tokens, sizes):
    kept = chosen(sizes)
    cache = ours.compress(prefills[0], [mx.array(k) for k in kept], Dense())
    full = ours.compress(prefills[0], None, Dense())
    with hidden(ours, kept, full.layers):
        expected = ours.extend(full, tokens[PROMPT:]).logits
    assert apart(ours.extend(cache, tokens[PROMPT:]).logits, expected) <= 1e-4


def test_heads_of_different_budgets_are_rows_hidden_from_a_head(ours, folder, prefills, tokens):
    """90 and 40 rows: the shorter head is filled up and the filling hidden, against torch with a mask a head."""
    kept = [[k[0], k[1][:40]] for k in chosen([KEPT, KEPT])]
    filled = [np.stack([k[0], np.concatenate([k[1], np.zeros(KEPT - 40, int)])]) for k in kept]
    cache = ours.compress(prefills[0], [mx.array(k) for k in filled], Dense())
    attend = ours._module.scaled_dot_product_attention

    def function(queries, keys, values, cache, scale, mask):
        size, new = keys.shape[-2], queries.shape[-2]
        seen = np.tri(new, size, size - new, dtype=bool)[None].repeat(4, axis=0)
        seen[2:, :, 40:KEPT] = False
        return attend(queries, keys, values, cache=cache, scale=scale, mask=mx.array(seen[None]))

    with ours._attending(function):
        found = ours.extend(cache, tokens[PROMPT:]).logits
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    size = len(tokens)
    for layer, block in enumerate(model.model.layers):
        seen = torch.ones(size, size, dtype=torch.bool).tril().repeat(4, 1, 1)
        for head in range(4):
            evicted = torch.ones(PROMPT, dtype=torch.bool)
            evicted[torch.from_numpy(kept[layer][head // 2])] = False
            seen[head, PROMPT:, :PROMPT] &= ~evicted
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None]
        block.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0, PROMPT:]
    assert apart(found, expected) <= 1e-4


def test_one_by_one_at_once_and_in_chunks_are_the_same(ours, prefills, tokens, monkeypatch):
    cache = ours.compress(prefills[0], [mx.array(k) for k in chosen([KEPT, KEPT])], Dense())
    singly, chunked = cache.copy(), cache.copy()
    once = ours.extend(cache.copy(), tokens[PROMPT:])
    assert once.queries[0].shape == (4, 80, 16)
    one_by_one = mx.concatenate([ours.extend(singly, tokens[t : t + 1]).logits for t in range(PROMPT, 440)])
    monkeypatch.setattr(mlx_backend, "CHUNK", 32)
    in_chunks = ours.extend(chunked, tokens[PROMPT:])
    assert apart(one_by_one, once.logits) <= 1e-4 and apart(in_chunks.logits, once.logits) <= 1e-4
    assert apart(in_chunks.queries[1], once.queries[1]) <= 1e-4
    assert singly.position == chunked.position == 440 and cache.position == PROMPT


def test_a_copy_and_its_original_grow_apart(ours, prefills, tokens):
    """Also once the original has buffers of its own, and in packed storage."""
    for storage in (Dense(), TurboQuantStorage(sinks=2, recent=10, flush=4)):
        cache = ours.compress(prefills[0], [mx.array(k) for k in chosen([KEPT, KEPT])], storage)
        ours.extend(cache, tokens[PROMPT : PROMPT + 10])
        before = cache.nbytes
        twin = cache.copy()
        first = ours.extend(twin, tokens[PROMPT + 10 : PROMPT + 20]).logits
        assert (cache.position, cache.nbytes, twin.position) == (PROMPT + 10, before, PROMPT + 20)
        ours.extend(cache, tokens[:30])
        again = ours.extend(twin.copy(), tokens[:5]).logits
        assert apart(ours.extend(twin, tokens[:5]).logits, again) == 0
        assert first.shape == (10, 8192)


def test_evicting_again_agrees_with_torch(pair, prefills, tokens):
    """40 tokens are fed, then 60 of 130 rows are kept, in dense and in packed storage."""
    kept = chosen([KEPT, KEPT])
    rng = np.random.default_rng(9)
    again = [np.stack([np.sort(rng.permutation(130)[:60]) for _ in range(2)]) for _ in range(2)]
    for storage, tolerance in ((Dense(), 5e-4), (TurboQuantStorage(sinks=2, recent=30), 0.5)):
        logits, contents = [], []
        for backend, prefill, like in zip(pair, prefills, (mx.array, torch.from_numpy), strict=True):
            cache = backend.compress(prefill, [like(k) for k in kept], storage)
            backend.extend(cache, tokens[PROMPT : PROMPT + 40])
            cache = backend.recompress(cache, [like(k) for k in again])
            contents.append(backend.contents(cache))
            logits.append(backend.extend(cache, tokens[PROMPT + 40 : PROMPT + 60]).logits)
            assert cache.position == PROMPT + 60
        np.testing.assert_array_equal(contents[0].positions, contents[1].positions)
        assert apart(*logits) <= tolerance
        near = np.abs(to_numpy(contents[0].keys[1]) - to_numpy(contents[1].keys[1])) < 1e-3
        assert near.mean() > 0.999


# Bytes


def test_bytes_are_those_of_torch_and_room_to_grow_comes_in_steps(pair, prefills, tokens):
    kept = chosen([KEPT, KEPT])
    for storage in (Dense(), TurboQuantStorage(sinks=2, recent=10)):
        sizes = []
        for backend, prefill, like in zip(pair, prefills, (mx.array, torch.from_numpy), strict=True):
            cache = backend.compress(prefill, [like(k) for k in kept], storage)
            sizes.append([cache.nbytes, cache.allocated])
            backend.extend(cache, tokens[PROMPT : PROMPT + 40])
            sizes[-1].append(cache.nbytes)
        assert sizes[0] == sizes[1]
    cache = pair[0].compress(prefills[0], [mx.array(k) for k in kept], Dense())
    pair[0].extend(cache, tokens[PROMPT : PROMPT + 1])
    assert cache.nbytes == 2 * 2 * 2 * (KEPT + 1) * 16 * 4 and cache.allocated == 2 * 2 * 2 * 256 * 16 * 4
    buffer = cache.layers[0]._buffers[0]
    cache.reserve(256 - KEPT - 1)
    assert cache.layers[0]._buffers[0] is buffer
    cache.reserve(256 - KEPT)
    assert cache.allocated == 2 * 2 * 2 * 512 * 16 * 4


@pytest.mark.slow
def test_memory_of_evicted_tokens_is_given_back(ours, tokens):
    def live() -> int:
        gc.collect()
        mx.clear_cache()
        return mx.get_active_memory()

    before = live()
    prefill = ours.prefill(tokens, observe=1)
    whole = live() - before
    assert whole >= 2 * 2 * 2 * 440 * 16 * 4
    cache = ours.compress(prefill, [mx.array(k) for k in chosen([40, 40])], Dense())
    del prefill
    held = live() - before
    assert cache.nbytes <= held < whole / 4


def test_the_peak_counts_since_it_was_last_asked_for(ours):
    x = mx.zeros((1000, 1000)) + 1
    mx.eval(x)
    del x
    assert ours.peak_bytes() >= 4e6
    assert ours.peak_bytes() < mx.get_active_memory() + 4e6


@pytest.mark.parametrize("storage", [Dense(), TurboQuantStorage(sinks=2, recent=10)], ids=["dense", "packed"])
def test_a_saved_cache_goes_on_where_it_was(ours, prefills, tokens, tmp_path, monkeypatch, storage):
    """Through mlx-lm's own file format, which looks classes up by their name."""
    monkeypatch.setattr(mlx_lm_cache, "CompressedLayer", CompressedLayer, raising=False)
    cache = ours.compress(prefills[0], [mx.array(k) for k in chosen([KEPT, KEPT])], storage)
    ours.extend(cache, tokens[PROMPT : PROMPT + 10])
    mlx_lm_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache.layers)
    layers = mlx_lm_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    loaded = type(cache)(layers)
    assert (loaded.position, loaded.nbytes) == (PROMPT + 10, cache.nbytes)
    np.testing.assert_array_equal(layers[1].positions, cache.layers[1].positions)
    fed = [ours.extend(c, tokens[PROMPT + 10 : PROMPT + 30]).logits for c in (cache, loaded)]
    assert apart(*fed) == 0


# Decoding


def test_generates_what_torch_and_mlx_lm_generate(pair, prefills):
    kept = chosen([KEPT, KEPT])
    said = []
    for backend, prefill, like in zip(pair, prefills, (mx.array, torch.from_numpy), strict=True):
        cache = backend.compress(prefill, [like(k) for k in kept], Dense())
        said.append(backend.generate(cache.copy(), 7, 24))
        batch = backend.compress(prefill, [like(k) for k in kept], Dense(), batch=3)
        assert batch.nbytes == 3 * cache.nbytes
        assert backend.generate(batch, 7, 24) == said[-1]
    assert said[0] == said[1] and len(set(said[0])) > 1
    cache = pair[0].compress(prefills[0], [mx.array(k) for k in kept], Dense())
    stream = generate_step(mx.array([7]), pair[0].model, max_tokens=24, prompt_cache=cache.layers)
    assert [int(token) for token, _ in stream] == said[0]
    assert pair[0].generate(cache, 7, 0) == []


def test_the_other_kernel_rounds_differently_and_no_more(ours, prefills, tokens):
    cache = ours.compress(prefills[0], None, Dense())
    fused = ours.extend(cache.copy(), tokens[PROMPT:]).logits
    with ours.other_kernel():
        explicit = ours.extend(cache.copy(), tokens[PROMPT:]).logits
        single = ours.extend(cache.copy(), tokens[PROMPT : PROMPT + 1]).logits
    assert 0 < apart(explicit, fused) <= 1e-4
    assert apart(single, fused[:1]) <= 1e-4


def test_outputs_are_projected_as_torch_does(pair, rng):
    outputs = rng.normal(size=(4, 5, 16)).astype(np.float32)
    found, expected = (b.project(1, like(outputs)) for b, like in zip(pair, (mx.array, torch.from_numpy), strict=True))
    assert found.shape == (5, 64) and apart(found, expected) <= 1e-4


# Refusals


def test_refuses_models_it_can_not_compress(tmp_path, checkpoint):
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"intermediate_size": 32, "num_key_value_heads": 2}
    models = {
        "do not attend to all tokens": MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=50)),
        "another way than Llama and Qwen": CohereForCausalLM(CohereConfig(**sizes, **heads, pad_token_id=0)),
    }
    for number, (words, model) in enumerate(models.items()):
        model.save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=words):
            MLXBackend(str(tmp_path / str(number)), device="cpu")


def test_refuses_rotations_that_depend_on_the_prompt_and_damaged_weights(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "x")
    config = json.loads((copy / "config.json").read_text())
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": dynamic}))
    with pytest.raises(ValueError, match="RoPE type dynamic"):
        MLXBackend(str(copy), device="cpu")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="mlx-lm can't load"):
        MLXBackend(str(copy), device="cpu")


def test_refuses_attention_it_can_not_observe(checkpoint, monkeypatch):
    monkeypatch.setattr(mlx_backend, "ATTENTION", "another_name")
    with pytest.raises(ValueError, match="qwen2, whose attention can't be observed in mlx-lm: use the torch backend"):
        MLXBackend(str(checkpoint), device="cpu")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_refuses_a_gpu_that_is_not_there(checkpoint):
    assert MLXBackend.place("auto", "auto") == ("cpu", "float32")
    with pytest.raises(ValueError, match=r"^device=gpu needs Apple silicon"):
        MLXBackend(str(checkpoint), device="gpu")


def test_16_bit_arithmetic_runs(checkpoint, tokens):
    backend = MLXBackend(str(checkpoint), device="cpu", dtype="bfloat16")
    prefill = backend.prefill(tokens[:40], observe=3)
    assert prefill.queries[0].dtype == mx.bfloat16
    assert np.isfinite(to_numpy(backend.extend(backend.compress(prefill, None, Dense()), tokens[40:60]).logits)).all()


@pytest.mark.parametrize(
    "rotation, words",
    [
        (None, "layer 0 in another way"),
        (nn.Identity(), "layer 0 in another way"),
        (nn.RoPE(16, traditional=True), "layer 0 in another way"),
        (nn.RoPE(8), "other RoPE frequencies"),
        (nn.RoPE(16, base=10_010.0), "other RoPE frequencies"),
        (nn.RoPE(16, scale=0.99), "other RoPE frequencies"),
    ],
    ids=["none", "unknown", "interleaved", "partial", "base", "scale"],
)
def test_layers_that_rotate_otherwise_are_refused(rotation, words, rope):
    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.rope = nn.RoPE(16)
    make_exact([layer], rope, "checkpoint")
    assert isinstance(layer.self_attn.rope, ExactRope)
    layer.self_attn.rope = rotation
    with pytest.raises(ValueError, match=words):
        make_exact([layer], rope, "checkpoint")


def test_what_is_fed_again_is_seen_as_on_torch(pair, rng):
    tokens = rng.integers(2, 8000, size=300)
    seen: list[dict] = [{}, {}]
    for backend, found in zip(pair, seen, strict=True):
        prefill = backend.prefill(tokens[:250], 0)
        keys = to_numpy(prefill.keys[0]).copy()
        backend.reread(
            prefill, tokens[:50], lambda layer, *x, found=found: found.update({layer: [to_numpy(y) for y in x]})
        )
        np.testing.assert_array_equal(to_numpy(prefill.keys[0]), keys)
    assert sorted(seen[0]) == sorted(seen[1]) == [0, 1]
    for layer in (0, 1):
        for ours, theirs in zip(seen[0][layer], seen[1][layer], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=1e-3)


def test_output_weights_are_those_of_torch(pair):
    ours, theirs = (to_numpy(backend.output_weights(1)) for backend in pair)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_biases_of_queries_are_those_of_torch(pair):
    ours, theirs = (backend.query_bias(1) for backend in pair)
    assert (ours is None) == (theirs is None)  # Qwen2 has them, Llama has not
    if theirs is not None:
        np.testing.assert_allclose(to_numpy(ours), to_numpy(theirs), atol=1e-6)


def test_layers_of_different_lengths_agree_with_torch(pair, rng):
    tokens = rng.integers(2, 8000, size=300)
    kept = [np.stack([np.sort(rng.permutation(250)[:n]) for _ in range(2)]) for n in (60, 120)]
    logits = []
    for backend, make in zip(pair, (mx.array, torch.from_numpy), strict=True):
        cache = backend.compress(backend.prefill(tokens[:250], 0), [make(k) for k in kept], Dense())
        logits.append([to_numpy(backend.extend(cache, tokens[a:b]).logits) for a, b in ((250, 270), (270, 271))])
    for ours, theirs in zip(*logits, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=1e-3)
