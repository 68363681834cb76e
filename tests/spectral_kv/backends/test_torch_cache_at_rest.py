"""`cache.save(path, codec="spectral")` and what is loaded from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

import spectral_kv
from spectral_kv.at_rest.storage import SpectralAtRest
from tests.spectral_kv.coded_qwen import qwen, text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return qwen(tmp_path_factory.mktemp("model"), 2)


def filled(model, tokens=900, batch=1, method="full", **more):
    cache = spectral_kv.cache(model, method, **more)
    with torch.no_grad():
        model(text(tokens, batch=batch), past_key_values=cache)
    return cache


def logits(model, cache, batch=1):
    with torch.no_grad():
        return model(text(5, 9, batch), past_key_values=cache).logits


def test_a_loaded_cache_goes_on_and_its_file_is_smaller(model, tmp_path):
    sizes, errors = [], []
    for codec in (None, SpectralAtRest(ratio=4), SpectralAtRest(ratio=8, recent=16), "spectral"):
        cache = filled(model, batch=2)
        cache.save(tmp_path / "cache", tokens=text(900, batch=2), codec=codec)
        sizes.append((tmp_path / "cache").stat().st_size)
        again = spectral_kv.load(tmp_path / "cache", model, tokens=text(900, batch=2))
        assert (again.position, again.held, again.nbytes) == (900, 900, cache.nbytes)
        errors.append(float((logits(model, again, 2) - logits(model, cache, 2)).norm()))
    assert errors[0] == 0 < errors[1] < errors[2]
    assert sizes[0] > 7 * sizes[1] > 13 * sizes[2]  # float32 is twice 16 bits
    assert sizes[0] > 3 * sizes[3]


def test_tokens_that_matter_are_written_finer(model, tmp_path):
    cache, importance = filled(model), np.ones(900)
    importance[300:600] = 16
    codec, errors = SpectralAtRest(ratio=8, recent=16), []
    for one in (codec, codec.weighing(importance)):
        cache.save(tmp_path / "cache", codec=one)
        pairs = zip(cache.layers, spectral_kv.load(tmp_path / "cache", model).layers, strict=True)
        values = [[layer.sequences[0].stored.load()[1] for layer in pair] for pair in pairs]
        errors.append(sum(float(((a - b)[..., 300:600, :] ** 2).sum()) for a, b in values))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="importance is that of 900 tokens, and the cache has 500"):
        filled(model, 500).save(tmp_path / "cache", codec=codec.weighing(importance))


def test_evicted_tokens_are_written_where_all_heads_agree(model, tmp_path):
    cache = filled(model, method="streaming", budget=300)
    cache.save(tmp_path / "cache", codec=SpectralAtRest(ratio=None, step=1e-3))
    again = spectral_kv.load(tmp_path / "cache", model)
    for ours, theirs in zip(cache.layers, again.layers, strict=True):
        np.testing.assert_array_equal(ours.positions[0], theirs.positions[0])
    torch.testing.assert_close(logits(model, cache), logits(model, again), atol=0.3, rtol=0.1)


def test_what_can_not_be_written_is_refused(model, tmp_path):
    path = tmp_path / "cache"
    with pytest.raises(ValueError, match="every head has evicted tokens of its own"):
        filled(model, method="random", budget=100).save(path, codec="spectral")
    with pytest.raises(ValueError, match=r"storage=TurboQuantStorage.*leave codec out"):
        filled(model, storage="turboquant_4bit").save(path, codec="spectral")
    with pytest.raises(ValueError, match="SpectralAtRest is for caches that nobody attends to"):
        spectral_kv.cache(model, "full", storage=SpectralAtRest())
    with pytest.raises(ValueError, match="codec=zip is not known"):
        filled(model).save(path, codec="zip")
    with pytest.raises(ValueError, match="ratio=99 can't be met"):
        filled(model).save(path, codec=SpectralAtRest(ratio=99))
    assert not list(tmp_path.iterdir())


def test_damaged_files_and_files_of_others_are_refused_in_one_sentence(model, tmp_path):
    filled(model, 200).save(tmp_path / "cache", codec="spectral")
    whole = (tmp_path / "cache").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: int(share * len(whole))] for share in (0.001, 0.3, 0.999)]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :]
        for at in rng.integers(0, len(whole), 40)
    ]
    for content in damaged:
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match=r"does not hold a cache|is damaged|was written by version") as refused:
            spectral_kv.load(tmp_path / "broken", model)
        assert "\n" not in str(refused.value)
    torch.manual_seed(2)
    other = Qwen2ForCausalLM(model.config).eval()
    with pytest.raises(ValueError, match="the cache of another model"):
        spectral_kv.load(tmp_path / "cache", other)
    bases = Path(model.config._name_or_path) / "bases.safetensors"
    bases.rename(tmp_path / "bases")
    with pytest.raises(ValueError, match=r"is not there: save spectral_kv\.bases"):
        spectral_kv.load(tmp_path / "cache", model)
    given = SpectralAtRest(str(tmp_path / "bases"), ratio=None, step=1.0)
    assert spectral_kv.load(tmp_path / "cache", model, codec=given).held == 200
    (tmp_path / "bases").rename(bases)
