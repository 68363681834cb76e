"""Caches whose layers and KV heads hold different numbers of tokens, or tokens with a bias."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from spectral_kv.backends import torch as of_models
from spectral_kv.backends import torch_runs
from spectral_kv.backends.torch_cache import CompressedLayer
from spectral_kv.backends.torch_runs import RunsLayer, read
from spectral_kv.compressor import Compressor
from spectral_kv.heads import held, runs
from spectral_kv.refit import Refit, Refitted
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.dense import Dense, DenseTokens
from spectral_kv.storage.turboquant import TurboQuantStorage
from tests.spectral_kv.backends.test_torch import causal_masks, evict, masked_logits

PROMPT, FED = 200, 24


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def tokens(rng):
    return rng.integers(2, 8000, size=300)


@pytest.fixture
def prefill(backend, tokens):
    return backend.prefill(tokens[:PROMPT], PROMPT)


def ragged(backend, rng) -> list[list[torch.Tensor]]:
    """Random numbers of random tokens for every layer and KV head."""
    return [
        [
            torch.from_numpy(np.sort(rng.permutation(PROMPT)[: rng.integers(5, PROMPT)]))
            for _ in range(backend.shape.kv_heads)
        ]
        for _ in range(backend.shape.layers)
    ]


@pytest.mark.parametrize("seed", range(24))
def test_a_ragged_cache_is_the_model_with_masked_attention(seed, backend, model, tokens, prefill):
    kept = ragged(backend, np.random.default_rng(seed))
    cache = backend.compress(prefill, kept, Dense())
    masks = causal_masks(backend, PROMPT + FED)
    evict(masks, kept, PROMPT)
    expected = masked_logits(model, tokens[: PROMPT + FED], masks)[PROMPT:]
    at_once = backend.extend(cache.copy(), tokens[PROMPT : PROMPT + FED]).logits
    torch.testing.assert_close(at_once, expected, atol=1e-4, rtol=1e-4)
    one_by_one = [backend.extend(cache, tokens[i : i + 1]).logits for i in range(PROMPT, PROMPT + 3)]
    torch.testing.assert_close(torch.cat(one_by_one), expected[:3], atol=1e-4, rtol=1e-4)
    assert read.get() is None


def one_by_one(query, keys, values, scaling: float, seen=slice(None)) -> torch.Tensor:
    """What a query `[dim]` reads of the `seen` ones of `[tokens, dim]`; sums go from token to token.

    So adding 0 for a token that is not seen is as if it were not there, to the last bit.
    """
    query, keys, values = (x.numpy() for x in (query, keys, values))
    logits = (keys * query).sum(-1) * np.float32(scaling)
    weights = np.zeros_like(logits)
    weights[seen] = np.exp(logits[seen] - logits[seen].max())
    return torch.from_numpy(np.cumsum(weights[:, None] * values, axis=0)[-1] / np.cumsum(weights)[-1])


@pytest.mark.parametrize("seed", range(24))
def test_decoding_is_masked_attention_bit_for_bit_if_sums_do_not_depend_on_zeros(
    seed, backend, tokens, prefill, monkeypatch
):
    kept = ragged(backend, np.random.default_rng(seed))
    apart, whole = backend.compress(prefill, kept, Dense()), backend.compress(prefill, None, Dense())

    def of_run(query, keys, values, mask, scale):
        """Query heads of a group stand side by side, as tokens of its KV head."""
        heads = zip(query[0], keys[0], values[0], strict=True)
        found = [torch.stack([one_by_one(q, k, v, scale) for q in queries]) for queries, k, v in heads]
        return torch.stack(found)[None]

    def masked(module, query, keys, values, mask, scaling, **others):
        found, group = [], query.shape[1] // keys.shape[1]
        for head, q in enumerate(query[0]):
            seen = np.append(kept[module.layer_idx][head // group].numpy(), np.arange(PROMPT, keys.shape[2]))
            found.append(one_by_one(q[0], keys[0, head // group], values[0, head // group], scaling, seen))
        return torch.stack(found)[None, None], None

    monkeypatch.setattr(torch_runs, "scaled_dot_product_attention", of_run)
    monkeypatch.setattr(of_models, "sdpa_attention_forward", masked)
    for token in tokens[PROMPT : PROMPT + 3]:
        ours, theirs = (backend.extend(cache, np.array([token])).logits for cache in (apart, whole))
        assert torch.equal(ours, theirs)


def test_attention_over_a_run_is_masked_attention_to_the_last_bits(rng):
    """What is evicted lies behind a mask in one and is not there in the other; float32, one token.

    Kernels with and without a mask add in another order: at most a few units of the last place lie between.
    """
    counts, longest, dim = (37, 64), 64, 32
    held_by = [[torch.from_numpy(rng.normal(size=(1, 1, n, dim)).astype("f4")) for _ in range(2)] for n in counts]
    positions = [np.arange(n)[None] for n in counts]
    made = [
        CompressedLayer(DenseTokens(*pair), torch.float32, 64, p) for pair, p in zip(held_by, positions, strict=True)
    ]
    queries, keys, values = (torch.from_numpy(rng.normal(size=(1, h, 1, dim)).astype("f4")) for h in (4, 2, 2))
    layer = RunsLayer(made)
    layer.update(keys, values)
    read.set(None)
    ours = layer.attend(queries, dim**-0.5)
    whole = [[torch.cat([x, new[:, h : h + 1]], -2) for x, new in zip(pair, (keys, values), strict=True)]
             for h, pair in enumerate(held_by)]  # fmt: skip
    mask = torch.zeros(1, 4, 1, longest + 1, dtype=torch.bool)
    for head in range(4):
        mask[:, head, :, : counts[head // 2] + 1] = True
    padded = [torch.cat([pad(w[i], (0, 0, 0, longest + 1 - w[i].shape[-2])) for w in whole], 1) for i in range(2)]
    theirs = scaled_dot_product_attention(queries, *padded, mask, scale=dim**-0.5, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


@pytest.mark.parametrize(
    "storage", [Dense(), TurboQuantStorage(4, 4, sinks=2, recent=16, flush=8)], ids=["dense", "4bit"]
)
def test_equal_heads_in_runs_are_the_cache_as_it_was(storage, backend, tokens, prefill):
    kept = select_layers([torch.rand(2, PROMPT) for _ in range(2)], Budget(80, 2, 8))
    whole, apart = (backend.compress(prefill, k, storage) for k in (kept, [list(k) for k in kept]))
    assert isinstance(apart.layers[0], RunsLayer) and not isinstance(whole.layers[0], RunsLayer)
    assert apart.nbytes == whole.nbytes
    for part in (tokens[PROMPT : PROMPT + 20], tokens[PROMPT + 20 : PROMPT + 21]):
        ours, theirs = (backend.extend(cache, part).logits for cache in (apart, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert backend.generate(apart, 5, 12) == backend.generate(whole, 5, 12)


@pytest.mark.parametrize("allocation", ["layer", "head", "global"])
def test_bytes_are_those_of_the_budget(allocation, backend, tokens, prefill):
    """Counted, in the memory of its tensors, and as torch's allocator says: what it gave less what it took back."""
    budget = Budget(50, 2, 8, allocation=allocation)
    compressor = Compressor(backend, Random(), budget, Dense())
    kept = compressor.select([x * (i + 1) for i, x in enumerate(compressor.scores(prefill))])
    assert sum(map(held, kept)) == 2 * 2 * 50
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        cache = compressor.store(prefill, kept)
    due = 2 * 2 * 50 * 16 * 4 * 2  # layers, heads, tokens, channels, bytes, keys and values
    assert cache.nbytes == cache.allocated == due
    assert sum(event.self_cpu_memory_usage for event in seen.events()) == due
    tensors = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for layer in cache.layers
        for run in layer.runs
        for x in run.stored.load()
    }
    assert sum(tensors.values()) == due
    backend.extend(cache, tokens[PROMPT : PROMPT + 7])
    assert cache.nbytes == due + 2 * 2 * 7 * 16 * 4 * 2
    assert cache.allocated >= cache.nbytes


@pytest.mark.parametrize("allocation", ["layer", "head", "global"])
def test_a_cache_that_grew_is_brought_back_to_its_budget(allocation, backend, tokens, prefill):
    compressor = Compressor(backend, Knorm(), Budget(50, 2, 8, allocation=allocation), Dense())
    cache = compressor.store(prefill, compressor.choose(prefill))
    fed = backend.extend(cache, tokens[PROMPT : PROMPT + 30])
    before = backend.contents(cache)
    again = compressor.recompress(cache, 0, fed.queries)
    after = backend.contents(again)
    assert sum(map(held, after.positions)) == 2 * 2 * 50
    for layer in range(2):
        pairs = zip(runs(before.positions[layer]), runs(after.positions[layer]), strict=True)
        for (_, (old,)), (_, (new,)) in pairs:
            for one, other in zip(old, new, strict=True):
                assert set(other) <= set(one) and {0, 1, *range(PROMPT + 22, PROMPT + 30)} <= set(other)
    assert again.position == PROMPT + 30
    backend.extend(again, tokens[PROMPT + 30 : PROMPT + 32])


@pytest.mark.parametrize(
    "storage", [Dense(), TurboQuantStorage(4, 4, sinks=2, recent=16, flush=8)], ids=["dense", "4bit"]
)
@pytest.mark.parametrize("allocation", ["layer", "head"])
def test_a_cache_that_held_everything_parts_when_it_has_grown(allocation, storage, backend, tokens, prefill):
    compressor = Compressor(backend, Knorm(), Budget(PROMPT, 2, 8, allocation=allocation), storage)
    cache = compressor.store(prefill, compressor.choose(prefill))
    fed = backend.extend(cache, tokens[PROMPT : PROMPT + 30])
    again = compressor.recompress(cache, 0, fed.queries)
    assert sum(map(held, backend.contents(again).positions)) == 2 * 2 * PROMPT
    assert all(isinstance(layer, RunsLayer) for layer in again.layers) and again.position == PROMPT + 30
    backend.extend(again, tokens[PROMPT + 30 : PROMPT + 32])


def test_a_bias_is_added_to_the_logits_and_new_tokens_have_none(backend, tokens, prefill):
    """A bias of -1000 is an eviction, one of 0 nothing."""
    everything = [torch.arange(PROMPT).repeat(2, 1)] * 2
    bias = [torch.zeros(2, PROMPT) for _ in range(2)]
    part = tokens[PROMPT : PROMPT + 9]
    plain = backend.extend(backend.compress(prefill, None, Dense()), part).logits
    unbiased = backend.compress(prefill, everything, Dense(), refitted=[Refitted(b, None) for b in bias])
    assert unbiased.nbytes == backend.compress(prefill, None, Dense()).nbytes + 2 * 2 * PROMPT * 4
    torch.testing.assert_close(backend.extend(unbiased.copy(), part).logits, plain, atol=1e-4, rtol=1e-4)
    for b in bias:
        b[:, 50:150] = -1000.0
    hidden = backend.compress(prefill, everything, Dense(), refitted=[Refitted(b, None) for b in bias])
    without = backend.compress(prefill, [torch.cat([k[:, :50], k[:, 150:]], 1) for k in everything], Dense())
    for some in (part, part[:1], part[:1]):
        ours, theirs = (backend.extend(cache, some).logits for cache in (hidden, without))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    contents = backend.contents(hidden)
    q = [torch.randn(4, 3, 16) for _ in range(2)]
    torch.testing.assert_close(
        contents.attended(1, q[1], 0.25), backend.contents(without).attended(1, q[1], 0.25), atol=1e-5, rtol=1e-4
    )
    assert contents.bias[0].shape == (2, PROMPT + 11) and (contents.bias[0][:, PROMPT:] == 0).all()


def test_a_bias_stays_with_its_token(backend, tokens, prefill):
    compressor = Compressor(backend, Knorm(), Budget(50, 2, 8), Dense(), refit=Refit("bias"))
    kept = compressor.choose(prefill)
    cache = compressor.store(prefill, kept, refitted=compressor.refitted(prefill, kept))
    fed = backend.extend(cache, tokens[PROMPT : PROMPT + 30])
    before, after = (backend.contents(c) for c in (cache, compressor.recompress(cache, 0, fed.queries)))
    for head in range(2):
        old = dict(zip(before.positions[0][head].tolist(), before.bias[0][head].tolist(), strict=True))
        new = zip(after.positions[0][head].tolist(), after.bias[0][head].tolist(), strict=True)
        assert all(old[position] == bias for position, bias in new)


@pytest.mark.parametrize("allocation", ["uniform", "head"])
@pytest.mark.parametrize("refit", [None, Refit("bias")])
@pytest.mark.parametrize("scorer", [None, Knorm(), Wavelet()])
def test_compressing_at_once_is_scoring_choosing_and_storing(backend, prefill, scorer, refit, allocation):
    for kept in (50, PROMPT):
        compressor = Compressor(backend, scorer, Budget(kept, 2, 8, allocation=allocation), Dense(), refit=refit)
        cache, chosen = compressor.compress(prefill, batch=2)
        want = None if scorer is None else compressor.choose(prefill)
        other = compressor.store(prefill, want, 2, compressor.refitted(prefill, want))
        assert (chosen is None) == (scorer is None) and cache.batch == 2 and cache.nbytes == other.nbytes
        assert backend.generate(cache, 5, 4) == backend.generate(other, 5, 4)
        for layer in range(backend.shape.layers if want is not None else 0):
            assert all(torch.equal(a, b) for a, b in zip(chosen[layer], want[layer], strict=True))


def test_a_pass_over_the_keys_is_compressed_at_once_unless_something_is_refitted(backend, prefill, monkeypatch):
    asked = []
    monkeypatch.setattr("spectral_kv.compressor.pass_over_keys", lambda *about: "a pass")
    monkeypatch.setattr(
        type(backend), "select_and_compress",
        lambda self, prefill, scores, *more: asked.append((scores, *more)) or ("cache", "kept"),
    )  # fmt: skip
    budget, storage = Budget(50, 2, 8), Dense()
    assert Compressor(backend, Wavelet(), budget, storage).compress(prefill, batch=3) == ("cache", "kept")
    assert asked == [("a pass", budget, storage, 3)]
    Compressor(backend, Wavelet(), budget, storage, refit=Refit("bias")).compress(prefill)
    Compressor(backend, Wavelet(), replace(budget, tokens=PROMPT), storage).compress(prefill)
    assert len(asked) == 1


def test_packed_heads_of_different_lengths(backend, tokens, prefill, rng):
    storage = TurboQuantStorage(4, 4, sinks=2, recent=16, flush=8)
    kept = ragged(backend, rng)
    packed, dense = (backend.compress(prefill, kept, s) for s in (storage, Dense()))
    assert packed.nbytes < dense.nbytes
    ours, theirs = (backend.extend(cache, tokens[PROMPT : PROMPT + 20]).logits for cache in (packed, dense))
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.9


def test_equal_sequences_are_fed_together(backend, tokens, prefill, rng):
    kept = ragged(backend, rng)
    one, two = (backend.compress(prefill, kept, Dense(), batch) for batch in (1, 2))
    assert two.nbytes == 2 * one.nbytes
    assert backend.generate(two, 5, 6) == backend.generate(one, 5, 6)


def test_an_error_in_a_forward_leaves_nothing_behind(backend, tokens, prefill, rng):
    cache = backend.compress(prefill, ragged(backend, rng), Dense())
    with pytest.raises(RuntimeError, match="does not attend by way of spectral_kv"), torch.inference_mode():
        backend.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert read.get() is None


def test_what_is_fed_again_is_seen_and_forgotten(backend, tokens, prefill):
    seen = {}
    again = tokens[:40]

    def watch(layer, queries, keys, values, inputs):
        seen[layer] = [x.clone() for x in (queries, keys, values, inputs)]

    before = [x.clone() for x in (*prefill.keys, *prefill.values)]
    backend.reread(prefill, again, watch)
    for old, new in zip(before, (*prefill.keys, *prefill.values), strict=True):
        assert torch.equal(old, new)
    whole = backend.prefill(np.concatenate([tokens[:PROMPT], again]), 40)
    for layer in range(2):
        queries, keys, values, inputs = seen[layer]
        torch.testing.assert_close(queries, whole.queries[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(keys, whole.keys[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, whole.values[layer], atol=1e-4, rtol=1e-4)
        assert inputs.shape == (40,)
    embedded = backend.model.get_input_embeddings()(torch.from_numpy(again)).norm(dim=-1)
    torch.testing.assert_close(seen[0][3], embedded.detach())


def test_output_weights_are_those_of_the_projection(backend):
    outputs = torch.randn(4, 3, 16)
    weights = backend.output_weights(1)
    found = torch.einsum("hpd,hdo->po", outputs, weights)
    torch.testing.assert_close(found, backend.project(1, outputs), atol=1e-5, rtol=1e-4)
