"""Steps over buffers say what the eager path says; captured on a GPU, the same code without a graph elsewhere."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_kv
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.backends.torch_cache import CompressedLayer
from spectral_kv.engine.decoding import Engine
from spectral_kv.engine.forward import Blocks, Modules
from spectral_kv.engine.held import HeldCoded, HeldDense
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense, DenseTokens
from spectral_kv.storage.turboquant import TurboQuantStorage

CUDA = torch.cuda.is_available()
WHERE = "cuda" if CUDA else "cpu"
STORAGES = {
    "dense": Dense(),
    "packed": TurboQuantStorage(sinks=2, recent=16, flush=8),
    "packed_uncentred": TurboQuantStorage(sinks=2, recent=16, flush=8, center_keys=False, key_bits=3, value_bits=2),
}
PROMPT, COUNT = 150, 40  # the recent window is flushed several times


def llama():
    """Two layers of 4 query and 2 KV heads of 64, with random biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attention_bias=True, initializer_range=0.2, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def torch_backend():
    return TorchBackend.wrap(llama().to(WHERE), engine="eager")


@pytest.fixture(scope="module")
def prefilled(torch_backend):
    return torch_backend.prefill(np.random.default_rng(0).integers(2, 8000, size=PROMPT), 1)


@pytest.fixture
def engine(torch_backend, monkeypatch):
    """An engine that takes any cache, also where `auto` would decode eagerly."""
    made = Engine(torch_backend.model, blocks=False)
    monkeypatch.setattr(made, "reason", lambda layers: None)
    return made


def kept(prefill, tokens):
    """Some tokens, every head its own."""
    rng = np.random.default_rng(1)
    return [
        select(torch.from_numpy(rng.random(k.shape[:2])).to(k.device), Budget(tokens, sinks=2, recent=8))
        for k in prefill.keys
    ]


def decoded(engine, cache, token, count):
    ids = torch.full((cache.batch,), token, device=engine.device)
    said = engine.generate(cache.layers, ids, count)
    assert (said == said[:, :1]).all()  # the sequences of a batch are equal
    return said[:, 0].tolist()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [None, 60], ids=["full", "evicted"])
def test_greedy_tokens_are_those_of_the_eager_path(torch_backend, engine, prefilled, storage, batch, tokens):
    chosen = None if tokens is None else kept(prefilled, tokens)
    eager, stepped = (torch_backend.compress(prefilled, chosen, STORAGES[storage], batch) for _ in range(2))
    assert decoded(engine, stepped, 5, COUNT) == torch_backend.generate(eager, 5, COUNT)
    assert stepped.nbytes == eager.nbytes
    for one, other in zip(stepped.layers, eager.layers, strict=True):
        for x, y in zip(one.stored.load(), other.stored.load(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def ragged(rows, heads, seed):
    """Some of so many `rows` for every layer and KV head, its own number of them."""
    rng = np.random.default_rng(seed)
    return [
        [torch.from_numpy(np.sort(rng.permutation(n)[: rng.integers(5, n)])).to(WHERE) for n in own]
        for own in np.reshape(rows, (-1, heads))
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_heads_of_different_numbers_of_tokens_say_what_the_eager_path_says(torch_backend, engine, prefilled, batch):
    """Also copies that part, after an eviction, and beside another cache in the same buffers."""
    caches = [torch_backend.compress(prefilled, ragged([PROMPT] * 4, 2, 1), Dense(), batch) for _ in range(2)]
    assert len({run.held for layer in caches[0].layers for run in layer.runs}) == 4
    assert decoded(engine, caches[0], 5, COUNT) == torch_backend.generate(caches[1], 5, COUNT)
    for step in range(2):
        held = engine.held(caches[0].layers, 3)
        assert decoded(engine, caches[0], 7, 3) == torch_backend.generate(caches[1], 7, 3)
        assert engine.held(caches[0].layers, 3) is held, "a cache alone stays where it is"
        twins = [cache.copy() for cache in caches]
        for token in (9, 900):  # each once more than the other
            assert decoded(engine, caches[0], token, 12) == torch_backend.generate(caches[1], token, 12)
            assert decoded(engine, twins[0], 77, 12) == torch_backend.generate(twins[1], 77, 12)
        rows = [run.held for layer in caches[0].layers for run in layer.runs]
        assert rows == [run.held for layer in caches[1].layers for run in layer.runs]
        kept = ragged(rows, 2, 2 + step)
        caches = [torch_backend.recompress(cache, kept) for cache in caches]
        assert decoded(engine, caches[0], 6, 11) == torch_backend.generate(caches[1], 6, 11)
        for cache in caches:  # forward passes go on from there
            torch_backend.extend(cache, np.arange(30, 37))
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.nbytes == other.nbytes
        for a, b in zip(one.runs, other.runs, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            for x, y in zip(a.stored.load(), b.stored.load(), strict=True):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_every_layer_has_room_for_the_longest_of_its_own_heads(torch_backend, prefilled):
    """Buffers of a short layer are not taken by a longer one, whatever the longest layer has."""
    engine = Engine(torch_backend.model, blocks=False)
    rows = [[[8, 9], [30, 40]], [[30, 40], [8, 9]]]  # of either cache, layer and head
    lengths = [[[torch.arange(n, device=WHERE) for n in heads] for heads in cache] for cache in rows]
    one, other = (torch_backend.compress(prefilled, kept, Dense()) for kept in lengths)
    held = engine.held(one.layers, 5)
    short, long = (row.keys.shape[-2] for row in held.rows)
    assert (short - 9, long) == (long - 40, held.capacity)
    del one
    assert held.free and not held.suits(other.layers, held.capacity - 40)
    decoded(engine, other, 5, held.capacity - 40)
    assert not any(
        row.keys.shape[-2] < layer.held for row, layer in zip(engine._held[0].rows, other.layers, strict=True)
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_it_goes_on_after_an_eviction_and_after_tokens_that_were_fed_eagerly(torch_backend, engine, prefilled, storage):
    caches = [torch_backend.compress(prefilled, None, STORAGES[storage]) for _ in range(2)]
    rng = np.random.default_rng(2)
    fed = rng.integers(2, 8000, size=9)

    def conversation(cache, generate):
        said = generate(cache, 5, 21)
        order = np.sort(rng_of(3).permuted(np.tile(np.arange(PROMPT + 21), (2, 1)), axis=1)[:, :70], axis=1)
        rows = [torch.from_numpy(order).to(torch_backend.device)] * len(cache.layers)
        cache = torch_backend.recompress(cache, rows)
        said += generate(cache, said[-1], 11)
        torch_backend.extend(cache, fed)
        return said + generate(cache, 7, 13)

    def rng_of(seed):
        return np.random.default_rng(seed)

    eager = conversation(caches[0], torch_backend.generate)
    stepped = conversation(caches[1], lambda cache, token, count: decoded(engine, cache, token, count))
    assert stepped == eager


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_a_copy_is_not_touched(torch_backend, engine, prefilled, storage):
    cache = torch_backend.compress(prefilled, None, STORAGES[storage])
    decoded(engine, cache, 5, 10)
    twin = cache.copy()
    before = [x.clone() for layer in twin.layers for x in layer.stored.load()]
    decoded(engine, cache, 6, 20)
    first = decoded(engine, twin.copy(), 5, 20)
    del cache
    other = torch_backend.compress(prefilled, None, STORAGES[storage])
    decoded(engine, other, 8, 20)
    for x, y in zip([x for layer in twin.layers for x in layer.stored.load()], before, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)
    assert decoded(engine, twin, 5, 20) == first


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_copies_of_a_cache_that_was_decoded_go_on_side_by_side(torch_backend, engine, prefilled, storage):
    """Their rows lie in the same buffers until one of them grows; what it writes is not the other's."""
    cache = torch_backend.compress(prefilled, None, STORAGES[storage])
    decoded(engine, cache, 5, 10)
    ours = [cache, cache.copy(), cache.copy()]
    theirs = torch_backend.compress(prefilled, None, STORAGES[storage])
    torch_backend.generate(theirs, 5, 10)
    theirs = [theirs, theirs.copy(), theirs.copy()]
    for token in (6, 900, 77):  # one after another, then each again
        for one, other in zip(ours, theirs, strict=True):
            token += 1
            assert decoded(engine, one, token, 12) == torch_backend.generate(other, token, 12)


def test_a_cache_alone_stays_where_it_is(torch_backend, engine, prefilled):
    for storage in ("dense", "packed"):
        cache = torch_backend.compress(prefilled, None, STORAGES[storage])
        decoded(engine, cache, 5, 4)
        held = engine.held(cache.layers, 4)
        decoded(engine, cache, 5, 4)
        assert engine.held(cache.layers, 4) is held
        engine.release()


def test_a_capture_has_room_for_the_row_that_it_writes(torch_backend, engine):
    prefill = torch_backend.prefill(np.arange(2, 258), 1)
    cache = torch_backend.compress(prefill, None, Dense())
    assert engine.held(cache.layers, 0).capacity > 256
    assert decoded(engine, cache, 5, 0) == []


def test_buffers_serve_one_cache_after_another(torch_backend, engine, prefilled):
    """A capture is made once for a size of batch and cache, not once a cache."""
    steps = set()
    for seed in range(3):
        cache = torch_backend.compress(prefilled, kept(prefilled, 60 + seed), Dense())
        decoded(engine, cache, 5, 4)
        steps |= {id(held.step) for held in engine._held}
        del cache
    assert len(steps) == 1
    engine.release()
    assert engine._held == []


def test_a_batch_may_say_different_things(torch_backend, engine, prefilled):
    cache = torch_backend.compress(prefilled, None, Dense(), batch=2)
    alone = [torch_backend.compress(prefilled, None, Dense()) for _ in range(2)]
    ids = torch.tensor([5, 900], device=engine.device)
    said = engine.generate(cache.layers, ids, 8)
    for column, (token, one) in enumerate(zip((5, 900), alone, strict=True)):
        assert said[:, column].tolist() == torch_backend.generate(one, token, 8)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_joined_blocks_give_the_logits_of_the_modules(checkpoint, kind):
    """Also where biases, a head of its own, and an attention scaling that is not the default come together."""
    from transformers import Qwen2ForCausalLM

    from spectral_kv.engine.rows import DenseRows

    if kind == "qwen2":
        model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=100,
                hidden_size=64,
                intermediate_size=80,
                num_hidden_layers=2,
                rope_parameters=rope,
                num_attention_heads=4,
                num_key_value_heads=1,
                attention_bias=True,
                mlp_bias=True,
                initializer_range=0.3,
            )
        )
    model = model.eval()
    untouched = copy.deepcopy(model)
    c = model.config
    lengths = torch.full((3, c.num_key_value_heads), 10)
    buffers = [torch.randn(3, c.num_key_value_heads, 12, 16) for _ in range(2 * c.num_hidden_layers)]
    rows = [DenseRows(k, v, lengths, 4) for k, v in zip(buffers[::2], buffers[1::2], strict=True)]
    ids, position = torch.tensor([[3], [50], [7]]), torch.tensor([77])
    with torch.inference_mode():
        want = Modules(untouched)(ids, position, rows)
        got = Blocks(model, compiled=False)(ids, position, rows)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        # weights are held once: what the modules read is what the blocks read
        torch.testing.assert_close(Modules(model)(ids, position, rows), want, atol=1e-5, rtol=1e-5)
    assert model.base_model.layers[0].self_attn.k_proj.weight.untyped_storage().data_ptr() == (
        model.base_model.layers[0].self_attn.q_proj.weight.untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("name", ["Qwen3", "Granite", "SmolLM3"])
def test_models_that_are_built_otherwise_are_not_joined(name):
    """Granite has Llama's parts by name, and multiplies between them; SmolLM3 leaves out a rotation."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="none of Llama, Mistral and Qwen2"):
        Blocks(getattr(transformers, f"{name}ForCausalLM")(config))


def test_a_model_with_hooks_is_not_joined_unless_they_only_record():
    model = llama()
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)  # hooks of transformers stay
    Blocks(model, compiled=False)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)
    with pytest.raises(ValueError, match="has hooks"):
        Blocks(model, compiled=False)
    hook.remove()
    Blocks(model, compiled=False)


@pytest.mark.parametrize("wrong", [None, "scale", "rotation", "norm"])
def test_joined_blocks_that_say_something_else_are_refused(monkeypatch, wrong):
    """In bfloat16 and float32; rounding alone is no reason."""
    made = llama()
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(copy.deepcopy(made).to(dtype))
        blocks = Blocks(engine.model, compiled=False)
        if wrong == "scale":
            blocks.scale *= 2
        elif wrong == "rotation":
            blocks.rotary = copy.deepcopy(blocks.rotary)
            blocks.rotary.inv_freq *= -1
        elif wrong == "norm":
            blocks.epsilon = 10.0
        monkeypatch.setattr("spectral_kv.engine.decoding.Blocks", lambda model, made=blocks: made)
        engine._modules = Modules(engine.model)
        assert (engine._verified() is blocks) == (wrong is None)


def test_it_says_why_it_decodes_eagerly(torch_backend, prefilled):
    dense = torch_backend.compress(prefilled, None, Dense()).layers
    packed = torch_backend.compress(prefilled, None, TurboQuantStorage()).layers
    narrow = torch_backend.compress(prefilled, None, TurboQuantStorage(recent=0)).layers
    assert Engine(torch_backend.model, "eager").reason(dense) == "engine=eager"
    assert "0 tokens" in Engine(torch_backend.model).reason(narrow)
    assert Engine(torch_backend.model).reason(packed) is None
    if not CUDA:
        assert "need a CUDA GPU" in Engine(torch_backend.model).reason(dense)
        with pytest.raises(ValueError, match="set engine=auto"):
            Engine(torch_backend.model, "graph")
    with pytest.raises(ValueError, match="engine=fast is not known"):
        Engine(torch_backend.model, "fast")
    apart = torch_backend.compress(prefilled, ragged([PROMPT] * 4, 2, 1), TurboQuantStorage()).layers
    assert "different numbers of tokens" in Engine(torch_backend.model).reason(apart)
    biased = torch_backend.compress(prefilled, ragged([PROMPT] * 4, 2, 1), Dense()).layers
    assert Engine(torch_backend.model).reason(biased) is None or not CUDA
    for layer in biased:
        layer.bias = [torch.zeros(1, run.held) for run in layer.runs]
    assert "a bias" in Engine(torch_backend.model).reason(biased)
    engine = Engine(torch_backend.model)
    engine.dtype = torch.float64
    assert "float64 has no kernel" in engine.reason(packed)
    engine = Engine(torch_backend.model)
    engine.device, engine._devices = torch.device("cuda:0"), ["cuda:0", "cuda:1"]
    assert "spread over cuda:0, cuda:1" in engine.reason(dense)
    engine = Engine(torch_backend.model)
    engine.device = torch.device("cuda:0")
    for dim, powers in ((48, False), (512, False), (256, True)):
        wide = [CompressedLayer(DenseTokens(*torch.zeros(2, 1, 1, 4, dim)), torch.float32, 4, np.zeros((1, 4)))]
        assert ("not a power of two from 16 to 256" in str(engine.reason(wide))) != powers


def test_the_kinds_of_buffers(torch_backend, engine, prefilled):
    for storage, kind in ((Dense(), HeldDense), (TurboQuantStorage(), HeldCoded)):
        cache = torch_backend.compress(prefilled, None, storage)
        decoded(engine, cache, 5, 2)
        assert isinstance(engine.held(cache.layers, 1), kind)


@pytest.mark.skipif(CUDA, reason="for CPUs")
def test_on_a_cpu_a_model_keeps_its_weights_where_they_are(torch_backend):
    """What becomes of them afterwards, adapters and new weights as well, is decoded with."""
    engine = Engine(copy.deepcopy(torch_backend.model))
    before = {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()}
    assert isinstance(engine.forward(), Modules)
    assert {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()} == before


def test_a_model_whose_weights_were_joined_still_learns():
    """One that was made in inference mode still runs in it."""
    ids = torch.tensor([[1, 2]])
    with torch.inference_mode():
        Blocks(made := llama(), compiled=False)
        want = made(input_ids=ids).logits
    model = llama()
    with torch.inference_mode():
        Blocks(model, compiled=False)
    got = model(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_compiled_blocks_in_a_graph_say_what_the_eager_path_says(prefilled, torch_backend):
    """In float32 token by token; nothing of it was left to chance by falling back to the modules."""
    joined = Engine(copy.deepcopy(torch_backend.model), "graph")
    chosen = [(storage, kept(prefilled, 60)) for storage in STORAGES.values()]
    for storage, rows in (*chosen, (Dense(), ragged([PROMPT] * 4, 2, 1))):
        for batch in (1, 4):
            caches = [torch_backend.compress(prefilled, rows, storage, batch) for _ in range(2)]
            assert decoded(joined, caches[0], 5, COUNT) == torch_backend.generate(caches[1], 5, COUNT)
    assert isinstance(joined.forward(), Blocks)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "ragged", "packed"])
def test_bfloat16_differs_only_where_the_best_tokens_are_level(kind, batch):
    """Before and after an eviction, and across flushes of the recent window."""
    model = llama().to(WHERE, torch.bfloat16)
    backend, engine = TorchBackend.wrap(model, engine="eager"), Engine(model, "graph")
    prefill = backend.prefill(np.random.default_rng(0).integers(2, 8000, size=PROMPT), 1)
    some = ragged([PROMPT] * 4, 2, 1) if kind == "ragged" else None
    ours, theirs = (backend.compress(prefill, some, STORAGES.get(kind, Dense()), batch) for _ in range(2))
    differ = []
    for turn in range(2):
        token = 5 + turn
        said = decoded(engine, ours, token, COUNT)
        for i, following in enumerate(said):
            logits = backend.extend(theirs, np.array([token])).logits[0].float()
            best = int(logits.argmax())
            if following != best:
                assert logits[best] - logits[following] < 0.05 * logits.std()
                differ.append(turn * COUNT + i)
            token = following
        if kind == "ragged":
            chosen = ragged([run.held for layer in ours.layers for run in layer.runs], 2, 2)
        else:
            rows = np.arange(ours.layers[0].held)
            each = [np.sort(np.random.default_rng(s).permutation(rows)[:70]) for s in range(2)]
            chosen = [torch.from_numpy(np.stack(each)).to(WHERE)] * len(ours.layers)
        ours, theirs = (backend.recompress(cache, chosen) for cache in (ours, theirs))
    print(f"{kind}, batch {batch}: {len(differ)} of {2 * COUNT} tokens differ, the first at {differ[:1]}")
    assert isinstance(engine.forward(), Blocks) or not CUDA


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize(
    "settings",
    [{"method": "full"}, {"method": "knorm", "every": 10}, {"method": "wavelet", "decode": "append", "every": 6}],
    ids=["full", "rescore", "append"],
)
def test_greedy_decodes_what_generate_does_by_captured_steps(storage, settings):
    model = llama().to(WHERE)
    ids = torch.from_numpy(np.random.default_rng(3).integers(2, 8000, (1, 90))).to(WHERE)
    budget = Budget(40, sinks=4, recent=8)
    ours, theirs = (spectral_kv.cache(model, budget=budget, storage=STORAGES[storage], **settings) for _ in range(2))
    said = ours.greedy(ids, 40)
    assert ours.reason() is None or not CUDA
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=theirs, max_new_tokens=40, do_sample=False
    )
    assert said.tolist() == got[:, 90:].tolist()
    assert (ours.held, ours.nbytes) == (theirs.held, theirs.nbytes)
