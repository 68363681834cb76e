"""`spectral_kv.cache` inside transformers' own `generate`."""

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import spectral_kv
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
from spectral_kv import names
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.backends.torch_cache import CompressedLayer
from spectral_kv.compressor import Compressor, SharedScores, observed
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.selection import select
from spectral_kv.storage.quantized_cache import QuantizedCacheStorage
from spectral_kv.storage.spectral import SpectralStorage
from spectral_kv.storage.turboquant import TurboQuantStorage

SIZES = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, initializer_range=0.2, bos_token_id=0,
    eos_token_id=None, pad_token_id=0,
)  # fmt: skip
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
BUDGET = spectral_kv.Budget(40, sinks=4, recent=8)


@pytest.fixture(scope="module")
def models():
    made = {}
    for kind, (config, model) in KINDS.items():
        torch.manual_seed(1)
        made[kind] = made[f"{kind} float32"] = model(config(**SIZES)).eval()
        made[f"{kind} float64"] = copy.deepcopy(made[kind]).double()
    return made


@pytest.fixture
def model(models):
    return models["qwen2"]


def prompt(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 512, (batch, tokens)))


def continued(model, ids, cache, count=12, **more):
    mask = more.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, do_sample=False, **more
    )


def padded(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `[1, tokens]` as a batch, and its mask."""
    longest = max(p.shape[1] for p in prompts)
    pads = [longest - p.shape[1] for p in prompts]
    ids = torch.cat([torch.nn.functional.pad(p, (n, 0)) for p, n in zip(prompts, pads, strict=True)])
    mask = torch.stack([(torch.arange(longest) >= n).long() for n in pads])
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(70,), (70, 23, 51)])
def test_a_budget_of_all_tokens_gives_the_plain_caches_tokens_over_three_turns(models, kind, lengths):
    model = models[kind]
    ids, mask = padded(*(prompt(n, seed=n) for n in lengths))
    ours, plain = spectral_kv.cache(model, "fourier", budget=1000), DynamicCache()
    for turn in range(3):
        got = continued(model, ids, ours, attention_mask=mask)
        assert torch.equal(got, continued(model, ids, plain, attention_mask=mask))
        more = prompt(9, seed=turn, batch=len(lengths))
        ids = torch.cat([got, more], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


# What reads the future, a finished prompt again, or maps that the small model has not
ELSEWHERE = {"oracle_mass", "oracle_value", "kvzip", "kvzip_plus", "ridge_kvzap"}


@pytest.mark.parametrize("budget", [BUDGET, 80])
@pytest.mark.parametrize("name", [name for name in names.METHODS if not ELSEWHERE & {name}])
def test_the_kept_tokens_are_those_of_the_pipeline(model, name, budget):
    yaml = pytest.importorskip("yaml")
    ids = prompt(181)
    statistics = spectral_kv.calibrate(model, [prompt(200, seed=7)[0].numpy()])
    cache = spectral_kv.cache(model, name, budget, statistics=statistics)
    model(ids, past_key_values=cache)
    if budget == 80:  # what the pipeline makes of `budget=80`
        settings = yaml.safe_load((Path(__file__).parents[2] / "conf" / "budget" / "default.yaml").read_text())
        budget = spectral_kv.Budget(80, settings["sinks"], settings["recent"], settings["selection"])
    backend = TorchBackend.wrap(model)
    compressor = Compressor(backend, names.method(name), budget, names.storage("dense"), statistics)
    full = FullRun(backend, ids[0].numpy(), 181, observed(compressor.scorer, 181))
    compressed = compress(compressor, full, SharedScores(), document=0)
    for ours, theirs in zip(cache.layers, compressed.cache.layers, strict=True):
        assert np.array_equal(ours.positions[0], theirs.positions)
        assert ours.held == (181 if compressor.scorer is None else budget.tokens)
        for pair in zip(ours.sequences[0].stored.load(), theirs.stored.load(), strict=True):
            torch.testing.assert_close(*pair)


def masked_forward(model, ids, gone):
    """Logits of a forward without a cache, where every layer and KV head hides the positions in `gone[layer]`.

    `gone[layer]` is a list of `(first query that no longer sees them, head, positions)`.
    """
    from spectral_kv.backends import torch as backend

    tokens = ids.shape[1]

    def hidden(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(1, query.shape[1], 1, 1)
        for first, head, positions in gone[module.layer_idx]:
            mask[:, head * groups : (head + 1) * groups, first:, positions] = False
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), mask, scale=scaling
        )
        return out.transpose(1, 2), None

    backend.AttentionInterface.register("hidden", hidden)
    before = model.config._attn_implementation
    model.config._attn_implementation = "hidden"
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        model.config._attn_implementation = before


def missing(cache, first):
    """What every layer and head no longer holds of the tokens before `first`, for queries from `first` on."""
    return [
        [(first, head, sorted(set(range(first)) - set(kept.tolist()))) for head, kept in enumerate(layer.positions[0])]
        for layer in cache.layers
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("seed", range(20))
def test_logits_are_those_of_a_forward_that_hides_the_evicted_tokens(models, seed, dtype, tolerance):
    """Over a prompt, a turn of several tokens, and two evictions while decoding.

    In double precision nothing but an error is left to differ. In single precision both sides round, each in its own
    order of summation: the tolerance is a share of the largest logit, which is 8.
    """
    model = models[f"{list(KINDS)[seed % 3]} {dtype}"]
    lengths = np.random.default_rng(seed).integers(45, 160, 2)
    first, second = int(lengths[0]), int(lengths[1])
    ids = prompt(first + second + 22, seed=seed)
    cache = spectral_kv.cache(model, ("fourier", "snapkv")[seed % 2], BUDGET, every=10)
    gone, evictions = [[], []], 0
    with torch.no_grad():
        parts = [model(ids[:, :first], past_key_values=cache).logits]
        for start, stop in [(first, first + second), *((i, i + 1) for i in range(first + second, ids.shape[1]))]:
            for layer, now in zip(gone, missing(cache, start), strict=True):
                layer += now
            before = cache.held
            parts.append(model(ids[:, start:stop], past_key_values=cache).logits)
            evictions += stop - start == 1 and cache.held < before
    assert cache.position == ids.shape[1] and evictions == 2
    expected = masked_forward(model, ids, gone)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("storage", ["dense", "turboquant_4bit"])
@pytest.mark.parametrize("name", ["fourier", "snapkv", "h2o", "random"])
def test_a_row_of_a_padded_batch_is_the_prompt_alone(model, name, storage):
    prompts = [prompt(n, seed=n) for n in (120, 33, 64)]
    ids, mask = padded(*prompts)
    settings = dict(budget=BUDGET, storage=storage, every=6)
    together = continued(model, ids, spectral_kv.cache(model, name, **settings), 30, attention_mask=mask)
    for row, alone in enumerate(prompts):
        got = continued(model, alone, spectral_kv.cache(model, name, **settings), 30)
        assert torch.equal(got[0, alone.shape[1] :], together[row, ids.shape[1] :])


def test_beams_and_sampling_run_as_with_the_plain_cache(model):
    ids = prompt(50)
    for how in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
        results = []
        for cache in (spectral_kv.cache(model, "fourier", budget=1000), DynamicCache()):
            torch.manual_seed(3)
            settings = dict(max_new_tokens=10, attention_mask=torch.ones_like(ids), **how)
            results.append(model.generate(ids, past_key_values=cache, **settings))
        assert torch.equal(*results)


@pytest.mark.parametrize("decode", ["rescore", "append"])
@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize("name", ["fourier", "h2o", "tova"])
def test_bytes_never_exceed_those_of_the_budget_and_the_interval(model, name, every, decode):
    cache, held, sizes = spectral_kv.cache(model, name, BUDGET, every=every, decode=decode), [], []
    with torch.no_grad():
        for token in prompt(300)[0]:
            model(token.view(1, 1), past_key_values=cache)
            held.append(cache.held)
            sizes.append(cache.allocated)
            stored = [x for layer in cache.layers for x in layer.sequences[0].stored.load()]
            beside = cache.nbytes - sum(x.nbytes for x in stored)
            assert cache.allocated == beside + sum(x.untyped_storage().nbytes() for x in stored)
    assert max(held) == BUDGET.tokens + every - 1 and cache.position == 300
    layers, kv_heads, dim, heads = 2, 2, 16, 4
    allowed = layers * kv_heads * (BUDGET.tokens + every) * (2 * dim + 1) * 4  # keys, values and positions
    if decode == "append":
        allowed += layers * kv_heads * BUDGET.tokens * 4
    if name != "fourier":  # the queries of the recent window, or as many as there are between evictions
        allowed += layers * heads * max(BUDGET.tokens // 2, every) * dim * 4
    assert max(sizes) <= allowed


@pytest.mark.parametrize("decode", ["rescore", "append"])
@pytest.mark.parametrize("name", ["fourier", "snapkv"])
def test_a_prompt_in_chunks_holds_the_budget_after_every_one(model, name, decode):
    """By `prefill`, by `generate`, and step by step, with the same result."""
    budget = spectral_kv.Budget(80)
    settings = dict(every=1 if decode == "append" else None, decode=decode)
    ids = prompt(330)
    ours, stepped, generated = (spectral_kv.cache(model, name, budget, **settings) for _ in range(3))
    with torch.no_grad():
        for piece in ids.split(100, dim=1):
            logits = model(piece, past_key_values=stepped).logits[:, -1]
            assert stepped.held == 80
    torch.testing.assert_close(ours.prefill(ids, chunk=100), logits)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, past_key_values=generated, max_new_tokens=1, prefill_chunk_size=100)
    for cache in (stepped, generated):
        assert cache.position == ours.position == 330
        for one, other in zip(cache.layers, ours.layers, strict=True):
            assert np.array_equal(one.positions[0], other.positions[0])
    whole = spectral_kv.cache(model, name, budget, **settings)
    whole.prefill(ids)
    assert any(
        not np.array_equal(a.positions[0], b.positions[0]) for a, b in zip(whole.layers, ours.layers, strict=True)
    )


def test_chunks_that_lose_nothing_give_the_logits_of_the_whole_prompt(model):
    ids, mask = padded(prompt(150), prompt(131))
    cache = spectral_kv.cache(model, "fourier", 1000)
    got = cache.prefill(ids, mask, chunk=40)
    torch.testing.assert_close(got, model(ids, attention_mask=mask, use_cache=False).logits[:, -1], atol=1e-4, rtol=0)
    more = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], dim=1)
    got, whole = cache.prefill(prompt(9, batch=2), more), torch.cat([ids, prompt(9, batch=2)], dim=1)
    torch.testing.assert_close(got, model(whole, attention_mask=more, use_cache=False).logits[:, -1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="chunk=0"):
        cache.prefill(ids, chunk=0)


@pytest.mark.parametrize("every", [1, 7])
def test_appending_keeps_what_scores_most_of_all_that_have_left_the_recent_window(model, every):
    """Seen where the score of a token does not depend on the others: in the first layer, by the norm of keys."""
    ids, plain, evictions = prompt(140), DynamicCache(), 0
    model(ids, past_key_values=plain)
    keys = plain.layers[0].keys[0]
    cache = spectral_kv.cache(model, "knorm", BUDGET, every=every, decode="append")
    with torch.no_grad():
        for start, stop in [
            (0, 60),
            *((i, i + 1) for i in range(60, 100)),
            (100, 120),
            *((i, i + 1) for i in range(120, 140)),
        ]:
            model(ids[:, start:stop], past_key_values=cache)
            layer = cache.layers[0]
            if layer.held == BUDGET.tokens:
                evictions += 1
                view = LayerView(keys[:, :stop], keys[:, :stop], None, np.arange(stop), slice(4, stop - 8), scaling=1)
                assert np.array_equal(layer.positions[0], select(Knorm().score(view), BUDGET))
    assert evictions >= 2 + 60 // every - 1


@dataclass(frozen=True)
class Fickle:
    """Scores by the position, and anew at every eviction, on a scale of its own."""

    reads: ClassVar[tuple[str, ...]] = ("keys",)

    @staticmethod
    def of(head: int, last: int) -> np.ndarray:
        return np.random.default_rng([head, last]).random(400, dtype=np.float32) * 10.0 ** (last % 5)

    def score(self, layer):
        positions = np.broadcast_to(layer.positions, layer.keys.shape[:2])
        scores = [self.of(head, at.max())[at] for head, at in enumerate(positions)]
        return torch.from_numpy(np.stack(scores).astype(np.float32))


@pytest.mark.parametrize("every", [1, 5])
def test_a_token_is_placed_once_when_it_leaves_the_recent_window(model, every):
    cache = spectral_kv.cache(model, Fickle(), BUDGET, every=every, decode="append")
    order, last = [[], []], None  # of every head: who has left the recent window and is held, the lowest first
    with torch.no_grad():
        for start, stop in [(0, 90), *((i, i + 1) for i in range(90, 150)), (150, 170), (170, 171)]:
            model(prompt(171)[:, start:stop], past_key_values=cache)
            if cache.held > BUDGET.tokens:
                continue
            for head, known in enumerate(order):
                scores = Fickle.of(head, stop - 1)
                new = [at for at in range(4 if last is None else last - 8, stop - 8)]
                place = {at: sum(scores[other] < scores[at] for other in known) for at in new}
                for at in sorted(new, key=lambda at: (place[at], scores[at]), reverse=True):
                    known.insert(place[at], at)
                del known[: len(known) - 28]
                expected = [*range(4), *sorted(known), *range(stop - 8, stop)]
                assert cache.layers[0].positions[0][head].tolist() == expected
            last = stop
    assert last == 171 or every > 1


def is_continued(cache, again, model, tokens: torch.Tensor) -> None:
    """Whether both give the same logits, and hold the same, over a turn of several tokens and then one by one."""
    with torch.no_grad():
        for start, stop in [(0, 20), *((i, i + 1) for i in range(20, tokens.shape[1]))]:
            assert torch.equal(*(model(tokens[:, start:stop], past_key_values=c).logits for c in (cache, again)))
            assert cache.nbytes == again.nbytes
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(ours.positions, theirs.positions, strict=True))


@pytest.mark.parametrize(
    ("name", "storage", "more"),
    [
        ("fourier", "dense", dict()),
        ("wavelet", "turboquant_4bit", dict(every=5)),
        ("random", "turboquant_3bit", dict(every=5)),
        ("h2o", "dense", dict(every=5)),
        ("snapkv", TurboQuantStorage(recent=8, flush=4, center_keys=False), dict(every=9)),
        (SnapKV(window=8), "turboquant_2bit", dict(decode="append")),
        ("wavelet_tri", TurboQuantStorage(recent=8, flush=4), dict(decode="append", every=3)),
        ("turboquant", "turboquant_4bit", dict()),
    ],
)
def test_a_saved_cache_continues_bit_for_bit(model, tmp_path, name, storage, more):
    """Right after the prompt, and with tokens over the budget that are not evicted yet."""
    ids, mask = padded(prompt(190), prompt(171))
    statistics = spectral_kv.calibrate(model, [prompt(200, seed=7)[0].numpy()])
    cache = spectral_kv.cache(model, name, BUDGET, storage, statistics=statistics, **more)
    own = {k: v for k, v in (("method", name), ("storage", storage)) if not isinstance(v, str)}
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    for turn in range(2):
        cache.save(tmp_path / "cache", tokens=ids)
        again = spectral_kv.load(tmp_path / "cache", model, tokens=ids, **own)
        assert (again.every, again.decode, again.position) == (cache.every, cache.decode, cache.position)
        is_continued(cache, again, model, prompt(33, seed=turn, batch=2))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("library", ["hqq", "quanto"])
def test_a_cache_in_another_librarys_codes_is_saved(model, tmp_path, library):
    pytest.importorskip("hqq" if library == "hqq" else "optimum.quanto")
    storage = QuantizedCacheStorage(library, group_size=16, recent=8, flush=4)
    cache = spectral_kv.cache(model, "fourier", BUDGET, storage, every=9)
    with torch.no_grad():
        model(prompt(120), past_key_values=cache)
        model(prompt(9, seed=1), past_key_values=cache)
    cache.save(tmp_path / "cache")
    is_continued(cache, spectral_kv.load(tmp_path / "cache", model, storage=storage), model, prompt(33))


def test_a_cache_of_beams_is_saved(model, tmp_path):
    """Beams share what they hold until they part."""
    cache = spectral_kv.cache(model, "fourier", BUDGET)
    continued(model, prompt(60), cache, count=2, num_beams=2)
    cache.save(tmp_path / "cache")
    is_continued(cache, spectral_kv.load(tmp_path / "cache", model), model, prompt(25, batch=2))


def test_a_damaged_file_is_refused_in_one_sentence(model, tmp_path):
    cache = spectral_kv.cache(model, "wavelet", BUDGET, "turboquant_4bit", every=5)
    model(prompt(190), past_key_values=cache)
    cache.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    rng = np.random.default_rng(0)
    header = int.from_bytes(whole[:8], "little")
    places = [*rng.integers(0, header + 8, 150), *rng.integers(header + 8, len(whole), 50)]
    damaged = [whole[: int(share * len(whole))] for share in (0, 0.001, 0.3, 0.999)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :] for at in places]
    for content in damaged:
        (tmp_path / "cache").write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold a cache|is damaged|was written by version") as refused:
            spectral_kv.load(tmp_path / "cache", model)
        assert str(refused.value).count("\n") == 0


def test_a_cache_is_loaded_with_what_it_was_saved_with(model, tmp_path):
    cache = spectral_kv.cache(model, Fickle(), BUDGET)
    model(prompt(90), past_key_values=cache)
    cache.save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"saved with method=Fickle\(\), which has no name"):
        spectral_kv.load(tmp_path / "own", model)
    full = spectral_kv.load(tmp_path / "own", model, method="full")
    model(prompt(30), past_key_values=full)
    assert full.held == BUDGET.tokens + 30
    with pytest.raises(ValueError, match="storage=dense, not turboquant_4bit"):
        spectral_kv.load(tmp_path / "own", model, method=Fickle(), storage="turboquant_4bit")
    with pytest.raises(ValueError, match="is not there"):
        spectral_kv.load(tmp_path / "none", model)
    with pytest.raises(ValueError, match="there is no folder"):
        cache.save(tmp_path / "none" / "cache")


def test_a_cache_of_another_model_text_or_version_is_refused(models, tmp_path, monkeypatch):
    ids = prompt(90)
    cache = spectral_kv.cache(models["llama"], "fourier", BUDGET)
    models["llama"](ids, past_key_values=cache)
    cache.save(tmp_path / "cache", tokens=ids)
    with pytest.raises(ValueError, match="another model"):
        spectral_kv.load(tmp_path / "cache", models["qwen3"])
    with pytest.raises(ValueError, match="another text"):
        spectral_kv.load(tmp_path / "cache", models["llama"], tokens=ids + 1)
    (tmp_path / "broken").write_bytes(b"no cache")
    with pytest.raises(ValueError, match="does not hold a cache"):
        spectral_kv.load(tmp_path / "broken", models["llama"])
    monkeypatch.setattr(spectral_kv, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"was written by version .*, this is 9\.9"):
        spectral_kv.load(tmp_path / "cache", models["llama"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="no"), "method=no is not known"),
        (dict(method=Knorm), "is no scorer"),
        (dict(storage=None), "storage=None is no storage"),
        (dict(storage=TurboQuantStorage), "is no storage"),
        (dict(budget=0.25), r"budget=0\.25 must be a whole number"),
        (dict(budget=512.0), r"budget=512\.0 must be a whole number"),
        (dict(budget="512"), "budget='512' must be a whole number"),
        (dict(budget=True), "budget=True must be a whole number"),
        (dict(budget=None), "budget=None must be a whole number"),
        (dict(budget=-5), "budget=-5 must be a whole number of tokens, at least 1"),
        (dict(every=2.5), r"every=2\.5 must be a whole number"),
        (dict(storage="no"), "storage=no is not known"),
        (dict(storage=SpectralStorage("bases")), "keeps every token"),
        (dict(method="oracle_mass"), "is an oracle"),
        (dict(every=0), "every=0"),
        (dict(decode="no"), "decode=no is not known"),
        (dict(method="snapkv", budget=60, decode="append"), "a budget with recent=64"),
        (dict(method="tri"), "is not there: pass statistics"),
        (dict(budget=spectral_kv.Budget(99, selection="per_head")), "needs all layers"),
    ],
)
def test_what_can_not_be_is_refused(model, settings, message):
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=message):
        spectral_kv.cache(model, **settings)
    assert model.config._attn_implementation == "eager"


def test_statistics_of_another_shape_or_of_nothing_are_refused(model):
    text = prompt(100)[0].numpy()
    for change, shape in (
        (dict(num_attention_heads=2, num_key_value_heads=1), r"\[2, 2, 8\]"),
        (dict(num_hidden_layers=1), r"\[1, 4, 8\]"),
        (dict(num_hidden_layers=3), r"\[3, 4, 8\]"),
    ):
        other = Qwen2ForCausalLM(Qwen2Config(**SIZES | change)).eval()
        with pytest.raises(ValueError, match=rf"bands\] = {shape}, this model has \[2, 4, 8\]"):
            spectral_kv.cache(model, "tri", BUDGET, statistics=spectral_kv.calibrate(other, [text]))
    statistics = spectral_kv.calibrate(model, [text])
    statistics.modulus[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="statistics that no queries have"):
        spectral_kv.cache(model, "tri", BUDGET, statistics=statistics)
    for windows in ([], [[]], text):
        with pytest.raises(ValueError, match="give \\[\\[ids of a text"):
            spectral_kv.calibrate(model, windows)


def test_a_model_without_a_folder_has_no_files(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spectral_kv.calibrate(model, [prompt(100)[0].numpy()]).save("query_statistics.safetensors")
    with pytest.raises(ValueError, match="of a Qwen2ForCausalLM without a folder is not there"):
        spectral_kv.cache(model, "tri", BUDGET)


def test_a_models_rotation_is_looked_at_once(model, monkeypatch):
    spectral_kv.cache(model, "fourier", BUDGET)
    monkeypatch.setattr(TorchBackend, "prefill", None)
    spectral_kv.cache(model, "fourier", BUDGET)


@pytest.mark.parametrize("number", [np.int64(40), torch.tensor(40)])
def test_whole_numbers_of_other_libraries_are_budgets(model, tmp_path, number):
    cache = spectral_kv.cache(model, "fourier", number)
    model(prompt(90), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert spectral_kv.load(tmp_path / "cache", model).held == 40


def test_a_file_is_as_readable_as_any_other_and_knows_its_tokens_by_row(model, tmp_path):
    ids = prompt(50, batch=2)
    cache = spectral_kv.cache(model, "fourier", BUDGET)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="it is a folder"):
        cache.save(tmp_path)
    cache.save(tmp_path / "cache", tokens=ids)
    (tmp_path / "other").touch()
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other"]
    assert spectral_kv.load(tmp_path / "cache", model, tokens=ids.tolist()).position == 50
    with pytest.raises(ValueError, match="another text"):
        spectral_kv.load(tmp_path / "cache", model, tokens=ids.reshape(1, 100))


def test_masked_tokens_after_the_padding_are_refused(model):
    for lengths in ((60, 60), (70, 30)):  # as long as one another, and not
        ids, mask = padded(*(prompt(n, seed=n) for n in lengths))
        for new, ended in ((9, 3), (1, 1)):  # a turn that begins with padding, and a sequence that has ended
            cache = spectral_kv.cache(model, "fourier", BUDGET)
            model(ids, attention_mask=mask, past_key_values=cache)
            later = torch.ones(2, new, dtype=torch.long)
            later[1, :ended] = 0
            with pytest.raises(ValueError, match="a token after the padding in front of the prompts is masked"):
                model(prompt(new, batch=2), attention_mask=torch.cat([mask, later], dim=1), past_key_values=cache)


def test_an_answer_that_ended_early_can_not_be_masked_later(model):
    ids = prompt(60, batch=2)
    cache = spectral_kv.cache(model, "fourier", BUDGET, every=7)
    ids = torch.cat([continued(model, ids, cache), prompt(5, batch=2)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, 68:72] = 0
    with pytest.raises(ValueError, match="sequences of a batch end together"):
        continued(model, ids, cache, attention_mask=mask)


def test_padding_on_the_right_is_refused_and_leaves_nothing_behind(model):
    ids, mask = padded(prompt(60, seed=1), prompt(30, seed=2))
    cache = spectral_kv.cache(model, "fourier", 1000)
    with pytest.raises(ValueError, match="padded on the right"):
        model(ids, attention_mask=mask.flip(1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"did not end, .*: cache\.reset\(\)"):
        continued(model, ids, cache, attention_mask=mask)
    cache.reset()
    plain = continued(model, ids, DynamicCache(), attention_mask=mask)
    assert torch.equal(continued(model, ids, cache, attention_mask=mask), plain)


@pytest.mark.parametrize("last", [False, True])
def test_a_cache_says_that_a_forward_pass_was_interrupted(model, monkeypatch, last):
    """Between two layers, and in the last one."""
    cache = spectral_kv.cache(model, "fourier", 1000)
    model(prompt(60), past_key_values=cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    if last:
        monkeypatch.setattr(cache.layers[1], "_settle", interrupted)
    else:
        hook = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(5), past_key_values=cache)
    monkeypatch.undo() if last else hook.remove()
    with pytest.raises(ValueError, match="did not end"):
        model(prompt(5), past_key_values=cache)
    cache.reset()
    assert torch.equal(continued(model, prompt(60), cache), continued(model, prompt(60), DynamicCache()))


def test_other_forward_passes_are_untouched_by_one_that_failed(model, monkeypatch):
    ids, mask = padded(*(prompt(n, seed=n) for n in (20, 12, 15)))
    cache = spectral_kv.cache(model, "fourier", 1000)
    with torch.no_grad():
        other = prompt(24, batch=3)
        expected = model(other, use_cache=False).logits
        model(ids, attention_mask=mask, past_key_values=cache)
        monkeypatch.setattr(CompressedLayer, "update", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            model(prompt(4, batch=3), past_key_values=cache)
        assert torch.equal(model(other, use_cache=False).logits, expected)
    assert cache.layers[0].held == 20


def test_another_number_of_sequences_is_refused_before_anything_changes(model):
    """Many answers to a text that was compressed once are those of as many equal prompts."""
    ids = torch.cat([prompt(60), prompt(5, seed=1)], dim=1)
    settings = dict(do_sample=True, num_return_sequences=3, max_new_tokens=10, attention_mask=torch.ones_like(ids))
    cache, plain = spectral_kv.cache(model, "fourier", 1000), DynamicCache()
    model(ids[:, :60], past_key_values=cache)
    with pytest.raises(ValueError, match=r"holds 1 sequences, and 3 are fed: .* cache\.batch_repeat_interleave"):
        model.generate(ids, past_key_values=cache, **settings)
    cache.batch_repeat_interleave(3)
    got = []
    for one in (cache, plain):
        torch.manual_seed(0)
        got.append(model.generate(ids, past_key_values=one, **settings))
    assert torch.equal(*got)
    with pytest.raises(ValueError, match="holds 3 sequences, and 1 are fed"):
        model(prompt(4), past_key_values=cache)


@pytest.mark.parametrize("chunk", [None, 100])
def test_generate_goes_on_from_a_padded_batch_that_was_prefilled(model, chunk):
    ids, mask = padded(*(prompt(n, seed=n) for n in (120, 40, 77)))
    plain, cache = DynamicCache(), spectral_kv.cache(model, "fourier", 1000)
    cache.prefill(ids[:, :-1], mask[:, :-1], chunk=chunk)
    got = continued(model, ids, cache, attention_mask=mask)
    assert torch.equal(got, continued(model, ids, plain, attention_mask=mask))
    more = prompt(9, batch=3)
    whole = torch.cat([got, more], dim=1)
    cache.prefill(torch.cat([got[:, -1:], more[:, :-1]], dim=1))  # what was generated last has not been fed
    mask = torch.nn.functional.pad(mask, (0, whole.shape[1] - mask.shape[1]), value=1)
    with pytest.raises(ValueError, match="attention_mask is of 9 tokens, and 141 are there"):
        cache.prefill(more[:, -1:], mask[:, -9:])
    assert torch.equal(
        continued(model, whole, cache, attention_mask=mask), continued(model, whole, plain, attention_mask=mask)
    )


@pytest.mark.parametrize("name", ["tri", "wavelet_tri"])
def test_a_prefilled_row_of_a_padded_batch_keeps_what_the_prompt_alone_does(model, name):
    statistics = spectral_kv.calibrate(model, [prompt(300, seed=7)[0].numpy()])
    ids, mask = padded(prompt(150, seed=1), prompt(90, seed=2))
    together, alone = (spectral_kv.cache(model, name, BUDGET, statistics=statistics) for _ in range(2))
    together.prefill(ids, mask)
    alone.prefill(prompt(90, seed=2))
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        assert np.array_equal(ours.positions[1], theirs.positions[0])


def test_a_copy_of_a_cache_is_of_the_same_model(model):
    """transformers' recipe for a prefix that many prompts share."""
    ids = torch.cat([prompt(90), prompt(9, seed=1)], dim=1)
    prefix = spectral_kv.cache(model, "fourier", BUDGET, every=5)
    model(ids[:, :90], past_key_values=prefix)
    again = copy.deepcopy(prefix)
    assert again.compressor.backend.model is model
    first = continued(model, ids, again)
    assert prefix.position == 90
    assert torch.equal(continued(model, ids, prefix), first)


@pytest.mark.parametrize("storage", ["dense", "turboquant_4bit"])
def test_a_cache_goes_on_after_inference_mode(model, storage):
    ids, more = prompt(60), prompt(5, seed=3)
    got = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = spectral_kv.cache(model, "snapkv", BUDGET, storage, every=9)
        with mode():
            said = continued(model, ids, cache, 4).clone()
        got.append(continued(model, torch.cat([said, more], dim=1).clone(), cache, 20))
    assert torch.equal(*got)


@pytest.mark.parametrize("storage", ["dense", TurboQuantStorage(sinks=2, recent=8, flush=8)], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "settings",
    [{"method": "full"}, {"method": "knorm", "every": 10}, {"method": "wavelet", "decode": "append", "every": 6}],
    ids=["full", "rescore", "append"],
)
def test_steps_decode_what_generate_does_and_evict_when_it_does(monkeypatch, model, storage, settings):
    """Without a GPU the same steps run without a graph."""
    ids = prompt(90)
    ours, theirs = (spectral_kv.cache(model, budget=BUDGET, storage=storage, **settings) for _ in range(2))
    assert "nothing is held" in ours.reason()
    monkeypatch.setattr(ours.compressor.backend.engine, "reason", lambda layers: None)
    steps = []
    monkeypatch.setattr(ours, "_stepped", lambda *args, taken=ours._stepped: steps.append(args) or taken(*args))
    said = ours.greedy(ids, 25)
    want = continued(model, ids, theirs, 25)
    assert said.tolist() == want[:, 90:].tolist() and steps
    more = prompt(3, seed=1)
    again = torch.cat([want, more], dim=1)
    assert ours.greedy(torch.cat([said[:, -1:], more], dim=1), 12).tolist() == (
        continued(model, again, theirs, 12)[:, again.shape[1] :].tolist()
    )
    assert (ours.position, ours.held, ours.nbytes) == (theirs.position, theirs.held, theirs.nbytes)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        np.testing.assert_array_equal(one.positions[0], other.positions[0])
    whole = torch.cat([again, prompt(13, seed=2)], dim=1)  # forward passes go on from there
    assert continued(model, whole, ours, 5).tolist() == continued(model, whole, theirs, 5).tolist()


def test_a_cache_says_why_it_is_decoded_by_forward_passes(model):
    """And is decoded all the same."""
    ids = prompt(60)
    packed = spectral_kv.cache(model, "knorm", BUDGET, TurboQuantStorage(sinks=2, recent=8, flush=8))
    packed.prefill(ids)
    assert packed.reason() is None
    assert "cache.greedy takes steps" in packed.compressor.backend.engine.reason(packed.layers)
    for name, batch, more, why in (
        ("knorm", 1, {}, "need a CUDA GPU"),
        ("snapkv", 1, {"every": 5}, "SnapKV reads queries of generated tokens"),
        ("knorm", 2, {}, "2 sequences are held apart"),
    ):
        ours, theirs = (spectral_kv.cache(model, name, BUDGET, **more) for _ in range(2))
        prompts = ids.expand(batch, -1)
        assert ours.greedy(prompts, 9).tolist() == continued(model, prompts, theirs, 9)[:, 60:].tolist()
        assert why in str(ours.reason()) or torch.cuda.is_available()
    with pytest.raises(ValueError, match="count=0"):
        packed.greedy(ids, 0)


def test_caches_of_a_model_share_an_engine_and_let_it_go(models):
    import gc
    from weakref import ref

    model = models["llama"]
    engines = [spectral_kv.cache(model, "knorm").compressor.backend.engine for _ in range(2)]
    one, other = spectral_kv.cache(model, "knorm"), spectral_kv.cache(model, "keydiff")
    assert one.compressor.backend.engine is other.compressor.backend.engine
    seen = ref(one.compressor.backend.engine)
    del engines, one, other
    gc.collect()
    assert seen() is None


def test_drafts_are_refused_in_a_sentence(model):
    with pytest.raises(ValueError, match="can't take tokens back, as assisted generation and prompt lookup"):
        continued(model, prompt(10).repeat(1, 8), spectral_kv.cache(model, "fourier", 1000), prompt_lookup_num_tokens=4)


@pytest.mark.slow
def test_a_compiled_model_evicts(model):
    ids = prompt(90)
    ours, plain = (spectral_kv.cache(model, "wavelet", BUDGET, every=2) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for start, stop in ((0, 80), (80, 81), (81, 82)):
            pair = [m(ids[:, start:stop], past_key_values=c).logits for m, c in ((compiled, ours), (model, plain))]
            torch.testing.assert_close(*pair)
    assert ours.held == plain.held == BUDGET.tokens
    torch.compiler.reset()


def test_layers_are_where_the_model_is(model):
    """Also one that was moved, or spread over devices, after its cache was made."""
    ids, mask = padded(prompt(60), prompt(30))
    cache = spectral_kv.cache(model, "fourier", 1000)
    model(ids, attention_mask=mask, past_key_values=cache)
    elsewhere = torch.empty((2, 4, 3, 16), device="meta")
    assert cache.layers[1].mask(elsewhere, None).device.type == "meta"
    spread = copy.deepcopy(model)
    again = spectral_kv.cache(spread, "fourier", 1000)
    spread.model.layers[1].to("meta")
    again.restore(cache.tensors(), 60, [60, 30])
    assert [layer.sequences[0].stored.keys.device.type for layer in again.layers] == ["cpu", "meta"]


def test_a_prompt_is_not_repeated_layer_by_layer(model):
    with pytest.raises(ValueError, match="finished prompt repeated"):
        spectral_kv.cache(model, "kvzip", BUDGET)
    with pytest.raises(ValueError, match="set allocation=uniform"):
        spectral_kv.cache(model, "knorm", spectral_kv.Budget(100, allocation="head"))


def test_the_names_are_the_configurations():
    yaml = pytest.importorskip("yaml")
    groups = Path(__file__).parents[2] / "conf"
    for group, table, made in (("method", names.METHODS, names.method), ("storage", names.STORAGES, names.storage)):
        files = {path.stem: yaml.safe_load(path.read_text()) for path in (groups / group).glob("*.yaml")}
        files.pop("spectral_at_rest", None)  # a codec of files: nothing attends to it
        assert set(files) == set(table)
        for name, settings in files.items():
            settings = settings.get("method", settings)
            settings = {k: v for k, v in settings.items() if k not in ("name", "title", "defaults")}
            target = settings.pop("_target_")
            if name.startswith(("quanto", "hqq")) and not find_spec("optimum" if name[0] == "q" else "hqq"):
                continue  # made only where its package is installed
            got = made(name)
            assert target == (got and f"{type(got).__module__}.{type(got).__name__}")
            for key, value in settings.items():
                if key == "bases":
                    continue  # those of the model
                expected = {"${seed}": 0, "${oc.select:model.kvzap,null}": None}.get(str(value), value)
                assert getattr(got, key) == expected, (name, key)


def test_the_three_lines_on_the_model_that_comes_along():
    model = AutoModelForCausalLM.from_pretrained(spectral_kv.reference_model())
    cache = spectral_kv.cache(model, "wavelet_tri", budget=64, storage="turboquant_4bit")
    assert model.generate(prompt(100), past_key_values=cache, max_new_tokens=5).shape == (1, 105)
