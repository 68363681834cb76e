import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from spectral_kv.backends.torch import TorchBackend
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.random import Random
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def tokens(rng):
    return rng.integers(2, 8000, size=300)


def logits_of(model, tokens, **kwargs) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None], **kwargs).logits[0]


def keep(backend, prefill, kept: int, seed: int) -> list[torch.Tensor]:
    budget = Budget(kept, sinks=2, recent=4)
    layers = range(backend.shape.layers)
    size = len(prefill.tokens)
    views = [
        LayerView(
            prefill.keys[i],
            prefill.values[i],
            backend.rope,
            np.arange(size),
            budget.evictable(size),
            scaling=1,
            seed=(0, i),
        )
        for i in layers
    ]
    return [select(Random(seed).score(view), budget) for view in views]


def test_prefill_and_extension_equal_the_plain_model(backend, model, tokens):
    expected = logits_of(model, tokens)
    prefill = backend.prefill(tokens[:200], observe=10)
    torch.testing.assert_close(prefill.logits, expected[199], atol=1e-4, rtol=1e-4)
    extension = backend.extend(backend.compress(prefill, None, Dense()), tokens[200:])
    torch.testing.assert_close(extension.logits, expected[200:], atol=1e-4, rtol=1e-4)


def test_observed_queries_reproduce_the_attention_weights(backend, model, tokens):
    """Queries and cached keys of the prefill give the weights that the model's own eager attention reports."""
    prefill = backend.prefill(tokens, observe=1)
    with torch.inference_mode():
        weights = model(torch.from_numpy(tokens)[None], output_attentions=True).attentions
    for layer in range(backend.shape.layers):
        keys = prefill.keys[layer].repeat_interleave(2, dim=0)
        ours = torch.softmax((prefill.queries[layer] @ keys.transpose(1, 2)) * backend.scaling, dim=-1)
        torch.testing.assert_close(ours[:, 0], weights[layer][0, :, -1], atol=1e-5, rtol=1e-3)


def test_a_budget_that_holds_the_prompt_reproduces_the_full_cache_exactly(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=10)
    full = backend.extend(backend.compress(prefill, None, Dense()), tokens[200:]).logits
    kept = backend.extend(backend.compress(prefill, keep(backend, prefill, 200, 0), Dense()), tokens[200:]).logits
    assert torch.equal(kept, full)


def masked_logits(model, tokens, masks: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model where layer i sees only `masks[i]` `[query_heads, tokens, tokens]`."""

    def masked(layer):
        def hook(module, args, kwargs):
            allowed = masks[layer][None]
            return args, kwargs | {"attention_mask": torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))}

        return hook

    hooks = [
        b.self_attn.register_forward_pre_hook(masked(i), with_kwargs=True) for i, b in enumerate(model.model.layers)
    ]
    try:
        return logits_of(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()


def causal_masks(backend, size: int) -> list[torch.Tensor]:
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    return [causal.repeat(backend.shape.query_heads, 1, 1) for _ in range(backend.shape.layers)]


def evict(masks: list[torch.Tensor], kept: list, start: int) -> None:
    """From position `start` on, hide what precedes it but the positions `kept` `[kv_heads, rows]` of each layer."""
    for mask, positions in zip(masks, kept, strict=True):
        for head in range(mask.shape[0]):
            evicted = torch.ones(start, dtype=torch.bool)
            evicted[torch.as_tensor(positions[head // 2])] = False
            mask[head, start:, :start] &= ~evicted


@pytest.mark.parametrize("seed", range(5))
def test_evicting_a_set_equals_masking_it(backend, model, tokens, seed):
    """Per-head sets, and a multi-token chunk after eviction, against the plain model with those keys masked out."""
    prompt, size = 200, len(tokens)
    prefill = backend.prefill(tokens[:prompt], observe=10)
    kept = keep(backend, prefill, 60, seed)
    compressed = backend.extend(backend.compress(prefill, kept, Dense()), tokens[prompt:]).logits
    masks = causal_masks(backend, size)
    evict(masks, kept, prompt)
    torch.testing.assert_close(compressed, masked_logits(model, tokens, masks)[prompt:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(compressed, logits_of(model, tokens)[prompt:], atol=1e-2)


def test_evicting_again_equals_masking_both_sets(backend, model, tokens):
    """60 of 200 tokens, 40 more are fed, then 50 of those 100 rows, other rows in every head."""
    prefill = backend.prefill(tokens[:200], observe=10)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    masks = causal_masks(backend, 300)
    evict(masks, [layer.positions for layer in cache.layers], 200)
    first = backend.extend(cache, tokens[200:240]).logits
    budget = Budget(50, sinks=2, recent=4)
    contents = backend.contents(cache)
    views = [
        LayerView(
            contents.keys[i],
            contents.values[i],
            backend.rope,
            contents.positions[i],
            budget.evictable(100),
            scaling=1,
            seed=(7, i),
        )
        for i in range(2)
    ]
    again = backend.recompress(cache, [select(Random(3).score(view), budget) for view in views])
    assert (again.position, again.layers[0].held) == (240, 50)
    assert not np.array_equal(*again.layers[0].positions)
    evict(masks, [layer.positions for layer in again.layers], 240)
    second = backend.extend(again, tokens[240:]).logits
    expected = masked_logits(model, tokens, masks)[200:]
    torch.testing.assert_close(torch.cat([first, second]), expected, atol=1e-4, rtol=1e-4)


def test_keys_of_an_evicted_cache_unrotate_to_what_they_were(backend, tokens):
    """Every head has its own positions; equal tokens have equal un-rotated keys in the first layer."""
    prefill = backend.prefill(tokens[:200], observe=1)
    whole = backend.rope.unrotate(prefill.keys[0], np.arange(200))
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    contents = backend.contents(cache)
    view = LayerView(contents.keys[0], contents.values[0], backend.rope, contents.positions[0], slice(0, 60), scaling=1)
    for head in range(2):
        torch.testing.assert_close(view.unrotated[head], whole[head][contents.positions[0][head]], atol=1e-5, rtol=1e-5)


def test_the_rows_go_up_and_down_like_a_saw(backend, tokens):
    """Compressed again whenever 16 rows have come on top of a budget of 40."""
    budget = Budget(40, sinks=2, recent=4)
    prefill = backend.prefill(tokens[:100], observe=1)
    cache = backend.compress(prefill, keep(backend, prefill, 40, 0), Dense())
    trace = []
    for token in tokens[100:180]:
        backend.extend(cache, np.array([token]))
        trace.append(cache.layers[0].held)
        if cache.layers[0].held >= 56:
            contents = backend.contents(cache)
            views = [
                LayerView(k, v, backend.rope, p, budget.evictable(56), scaling=1, seed=(i,))
                for i, (k, v, p) in enumerate(zip(contents.keys, contents.values, contents.positions, strict=True))
            ]
            cache = backend.recompress(cache, [select(Random(1).score(view), budget) for view in views])
            assert cache.layers[0].positions.max() == cache.position - 1  # the newest token is never lost
    assert trace == list(range(41, 57)) * 5
    assert cache.position == 180


def test_new_tokens_take_the_logical_position(backend, tokens):
    """A cache that goes on at its number of rows instead gives other logits."""
    prefill = backend.prefill(tokens[:200], observe=10)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    wrong = cache.copy()
    assert (cache.get_seq_length(), cache.position, cache.layers[0].held) == (200, 200, 60)
    for layer in wrong.layers:
        layer.seen = layer.held
    right, shifted = (backend.extend(c, tokens[200:220]).logits for c in (cache, wrong))
    assert (right - shifted).abs().max() > 0.1
    assert (cache.position, cache.layers[0].held) == (220, 80)


def test_the_models_own_forward_needs_no_positions(backend, model, tokens):
    """It asks the cache how long it is, and masks a chunk of several tokens by it, also after eviction."""
    prefill = backend.prefill(tokens[:200], observe=0)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    expected = backend.extend(cache.copy(), tokens[200:231]).logits
    assert (cache.get_seq_length(), cache.get_mask_sizes(31, 0)) == (200, (91, 140))
    torch.testing.assert_close(logits_of(model, tokens[200:231], past_key_values=cache), expected, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == cache.position == 231


def test_generate_goes_on_from_a_compressed_cache(backend, model, tokens):
    prefill = backend.prefill(tokens[:200], observe=0)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    expected = backend.generate(cache.copy(), int(tokens[200]), 12)
    ids = torch.from_numpy(tokens[:201])[None]
    said = model.generate(ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert said[0, 201:].tolist() == expected


def test_equal_sequences_are_fed_together(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=0)
    kept = keep(backend, prefill, 60, 0)
    one, three = (backend.compress(prefill, kept, Dense(), batch) for batch in (1, 3))
    expected, fed = (backend.extend(cache, tokens[200:210]) for cache in (one, three))
    torch.testing.assert_close(fed.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert three.nbytes == 3 * one.nbytes
    rows = [torch.arange(40).expand(2, -1)] * 2
    one, three = (backend.recompress(cache, rows) for cache in (one, three))
    assert three.nbytes == 3 * one.nbytes
    again = [backend.extend(cache, tokens[210:220]).logits for cache in (one, three)]
    torch.testing.assert_close(*again, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 64, 199, 500])
def test_a_prompt_in_chunks_is_the_prompt_at_once(backend, tokens, chunk):
    tokens = tokens[:200] if chunk > 1 else tokens[:40]
    whole, pieces = backend.prefill(tokens, observe=30), backend.prefill(tokens, observe=30, chunk=chunk)
    torch.testing.assert_close(pieces.logits, whole.logits, atol=1e-4, rtol=1e-4)
    for part in ("keys", "values", "queries"):
        for one, other in zip(getattr(pieces, part), getattr(whole, part), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 64])
def test_no_query_outlives_the_prompt_but_those_that_are_asked_for(backend, tokens, chunk):
    for observe in (0, 1, 70):
        queries = backend.prefill(tokens, observe, chunk).queries
        assert [tuple(q.shape) for q in queries] == [(4, observe, 16)] * 2
        assert all(q.untyped_storage().nbytes() == q.nbytes for q in queries)


@pytest.mark.parametrize("chunk", [None, 64])
def test_who_watches_sees_every_query_with_the_keys_up_to_it(backend, tokens, chunk):
    seen: dict[int, list] = {0: [], 1: []}
    prefill = backend.prefill(tokens, 300, chunk, lambda layer, *three: seen[layer].append(three))
    for layer, parts in seen.items():
        assert len(parts) == (5 if chunk else 1)
        torch.testing.assert_close(torch.cat([q for q, _, _ in parts], dim=1), prefill.queries[layer])
        for number, (queries, keys, values) in enumerate(parts):
            stop = number * 64 + queries.shape[1]
            torch.testing.assert_close(keys, prefill.keys[layer][:, :stop])
            torch.testing.assert_close(values, prefill.values[layer][:, :stop])


def test_a_model_that_is_there_already_is_wrapped_and_left_as_it_was(backend, model, tokens):
    wrapped = TorchBackend.wrap(model)
    assert (wrapped.shape, wrapped.scaling, wrapped.cache_dtype) == (backend.shape, backend.scaling, torch.float32)
    one, other = (b.prefill(tokens, observe=10, chunk=100) for b in (wrapped, backend))
    torch.testing.assert_close(one.logits, other.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.queries, other.queries, atol=1e-4, rtol=1e-4)
    assert wrapped.model is model and model.config._attn_implementation == "eager"
    assert TorchBackend.wrap(model, "bfloat16").prefill(tokens, observe=0).keys[0].dtype == torch.bfloat16


def test_feeding_one_by_one_equals_feeding_at_once(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=10)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    single = cache.copy()
    one_by_one = torch.cat([backend.extend(single, tokens[i : i + 1]).logits for i in range(200, 230)])
    torch.testing.assert_close(backend.extend(cache, tokens[200:230]).logits, one_by_one, atol=1e-4, rtol=1e-4)


def test_extending_a_copy_leaves_the_cache_alone(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=10)
    for storage in (Dense(), TurboQuantStorage(sinks=2, recent=10)):
        cache = backend.compress(prefill, keep(backend, prefill, 60, 0), storage)
        before = cache.nbytes
        first = backend.extend(cache.copy(), tokens[200:210]).logits
        assert (cache.nbytes, cache.position) == (before, 200)
        assert torch.equal(backend.extend(cache.copy(), tokens[200:210]).logits, first)


def test_a_compressed_cache_does_not_hold_on_to_the_prefill(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=10)
    cache = backend.compress(prefill, keep(backend, prefill, 60, 0), Dense())
    allocated = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.stored.load())
    assert allocated == cache.nbytes == 2 * 2 * 2 * 60 * 16 * 4  # layers, K and V, heads, tokens, dim, float32


def test_generates_what_transformers_generates(backend, model, tokens):
    ids = torch.from_numpy(tokens[:50])[None]
    expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, 50:].tolist()
    cache = backend.compress(backend.prefill(tokens[:49], observe=1), None, Dense())
    assert backend.generate(cache, int(tokens[49]), 12) == expected


@pytest.fixture(scope="module", params=[64, 128])
def wide(request, tmp_path_factory):
    """A random Qwen2 whose heads have as many channels as those of real models."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=500, hidden_size=2 * request.param, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return TorchBackend(str(folder), device="cpu", cache_dtype="float32")


def test_a_window_that_holds_everything_is_the_dense_cache_and_a_small_one_agrees(wide, rng):
    tokens = rng.integers(0, 500, size=360)
    prefill = wide.prefill(tokens[:300], observe=1)
    window = TurboQuantStorage(sinks=4, recent=400)
    small = TurboQuantStorage(sinks=4, recent=32, flush=16)
    exact, same, near = (
        torch.cat([wide.extend(cache, np.array([token])).logits for token in tokens[300:]])
        for cache in (wide.compress(prefill, None, storage) for storage in (Dense(), window, small))
    )
    assert torch.equal(exact, same)
    assert (near - exact).abs().max() > 0
    assert (near.argmax(-1) == exact.argmax(-1)).float().mean() >= 0.9


def test_fed_tokens_are_packed_when_they_leave_the_window(wide, rng):
    tokens = rng.integers(0, 500, size=400)
    cache = wide.compress(wide.prefill(tokens[:300], observe=1), None, TurboQuantStorage(recent=32, flush=16))
    for token in tokens[300:]:
        wide.extend(cache, np.array([token]))
    assert cache.layers[0].held == 400
    dense = 400 * 2 * 4 * wide.shape.dim * 2
    exact = (4 + 32 + 16) * 2 * 4 * wide.shape.dim * 2  # sinks, window and a chunk that waits
    assert cache.nbytes < exact + dense / 7


def test_tokens_fed_together_see_one_another_exactly(wide, rng):
    tokens = rng.integers(2, 500, 200)
    cache = wide.compress(wide.prefill(tokens[:40], observe=1), None, TurboQuantStorage(sinks=2, recent=8, flush=4))
    layer = cache.layers[0]
    new = torch.as_tensor(rng.normal(size=(1, wide.shape.kv_heads, 60, wide.shape.dim)), dtype=torch.float32)
    keys, values = layer.update(new, 2 * new)
    assert keys.shape[-2] == 100
    assert torch.equal(keys[..., 40:, :], new) and torch.equal(values[..., 40:, :], 2 * new)
    coded = layer.stored.load()[0][..., 40:, :]
    assert not torch.equal(coded, new), "what left the recent window is in codes afterwards"
    assert torch.equal(coded[..., -8:, :], new[..., -8:, :])


def test_an_evicted_packed_cache_stays_close(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=1)
    kept = keep(backend, prefill, 100, 0)
    caches = [backend.compress(prefill, kept, storage) for storage in (Dense(), TurboQuantStorage(sinks=2, recent=10))]
    rows = [torch.stack([torch.arange(0, 100, 2)] * 2)] * 2
    dense, packed = (backend.recompress(cache, rows) for cache in caches)
    assert packed.nbytes < dense.nbytes / 2
    np.testing.assert_array_equal(packed.layers[1].positions, dense.layers[1].positions)
    for one, other in zip(backend.contents(dense).keys, backend.contents(packed).keys, strict=True):
        assert 0 < (one - other).norm() / one.norm() < 0.15


def test_packed_storage_is_close_and_smaller(backend, tokens):
    prefill = backend.prefill(tokens[:200], observe=10)
    full = backend.compress(prefill, None, Dense())
    packed = backend.compress(prefill, None, TurboQuantStorage(sinks=2, recent=10))
    assert packed.nbytes < full.nbytes / 4
    exact, near = (torch.log_softmax(backend.extend(c, tokens[200:]).logits, -1) for c in (full, packed))
    assert (near - exact).abs().max() > 0
    assert (exact.exp() * (exact - near)).sum(-1).mean() < 0.1


def test_the_cache_dtype_is_what_is_stored(checkpoint, tokens):
    backend = TorchBackend(str(checkpoint), device="cpu", cache_dtype="bfloat16")
    cache = backend.compress(backend.prefill(tokens[:200], observe=1), None, Dense())
    backend.extend(cache, tokens[200:])
    assert cache.nbytes == 2 * 2 * 2 * 300 * 16 * 2


def changed(checkpoint, folder, **settings):
    """A copy of the checkpoint with other settings in its configuration."""
    copy = shutil.copytree(checkpoint, folder)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | settings))
    return str(copy)


def test_refuses_rotations_that_depend_on_the_prompt(checkpoint, tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="RoPE type dynamic"):
        TorchBackend(changed(checkpoint, tmp_path / "x", rope_parameters=dynamic), device="cpu")


def test_refuses_weights_that_lack_a_layer(checkpoint, tmp_path):
    """transformers would fill the layer with random numbers and only warn."""
    deeper = changed(checkpoint, tmp_path / "x", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ValueError, match=r"has no weights for model\.layers\.2\.input_layernorm\.weight and 11 more"):
        TorchBackend(deeper, device="cpu")


def test_refuses_layers_that_do_not_see_everything(tmp_path):
    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=50,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "sliding")
    with pytest.raises(ValueError, match="do not attend to all tokens"):
        TorchBackend(str(tmp_path / "sliding"), device="cpu")
    config.sliding_window = None
    MistralForCausalLM(config).save_pretrained(tmp_path / "full")
    assert TorchBackend(str(tmp_path / "full"), device="cpu").shape.layers == 1


def test_refuses_rotations_it_can_not_undo(tmp_path):
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    interleaved = CohereForCausalLM(CohereConfig(**sizes, intermediate_size=32, num_key_value_heads=2, pad_token_id=0))
    partial = StableLmForCausalLM(StableLmConfig(**sizes, intermediate_size=32, num_key_value_heads=2))
    for name, model in (("interleaved", interleaved), ("partial", partial)):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="another way than Llama and Qwen"):
            TorchBackend(str(tmp_path / name), device="cpu")


def test_accepts_a_model_in_bfloat16(checkpoint, tokens):
    backend = TorchBackend(str(checkpoint), device="cpu", dtype="bfloat16")
    prefill = backend.prefill(tokens[:200], observe=1)
    assert backend.extend(backend.compress(prefill, None, Dense()), tokens[200:]).logits.isfinite().all()


SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip


def test_refuses_a_layer_that_does_not_rotate_whichever_it_is():
    """SmolLM3 leaves the rotation out of every fourth layer."""
    torch.manual_seed(0)
    every = SmolLM3ForCausalLM(
        SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layers=[1, 1, 1, 1], pad_token_id=0)
    )
    assert TorchBackend.wrap(every.eval()).shape.layers == 4
    some = SmolLM3ForCausalLM(
        SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layers=[1, 1, 1, 0], pad_token_id=0)
    )
    with pytest.raises(
        ValueError, match="layer 3 of the SmolLM3ForCausalLM rotates keys in another way than its first"
    ):
        TorchBackend.wrap(some.eval())


def test_refuses_attention_that_can_not_be_observed():
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)).eval()
    with pytest.raises(
        ValueError, match="the GPTNeoXForCausalLM is of type gpt_neox, whose attention can't be observed"
    ):
        TorchBackend.wrap(model)
