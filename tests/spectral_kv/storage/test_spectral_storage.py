import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_kv import xp
from spectral_kv.backends.torch_bases import gradients
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.spectral import SpectralStorage


@pytest.fixture
def prefill(backend, rng):
    return backend.prefill(rng.integers(2, 8000, size=300), 1)


def error(backend, prefill, storage) -> float:
    held = [backend.contents(backend.compress(prefill, None, s)) for s in (storage, Dense())]
    pairs = zip(*(c.keys + c.values for c in held), strict=True)
    return float(np.mean([((a - b) ** 2).mean() / (b**2).mean() for a, b in pairs]))


def test_gradients_are_those_of_the_predictions(backend, prefill):
    following = np.arange(50, 90)
    keys, values = gradients(backend, prefill.keys, prefill.values, following, seed=0)
    assert [x.shape for x in keys + values] == [x.shape for x in prefill.keys + prefill.values]
    assert all(x.abs().sum() > 0 for x in keys + values)
    again, _ = gradients(backend, prefill.keys, prefill.values, following, seed=0)
    torch.testing.assert_close(again[0], keys[0])


def test_sinks_and_recent_window_stay_as_they_are(backend, prefill, bases_path):
    dense, coded = (
        backend.contents(backend.compress(prefill, None, s))
        for s in (Dense(), SpectralStorage(bases_path, 5, recent=20))
    )
    for a, b in zip(dense.keys + dense.values, coded.keys + coded.values, strict=True):
        np.testing.assert_array_equal(a[:, :4], b[:, :4])
        np.testing.assert_array_equal(a[:, -20:], b[:, -20:])
        assert not torch.equal(a[:, 4:-20], b[:, 4:-20])


def test_a_higher_ratio_costs_precision_and_none_is_wrong(backend, prefill, bases_path):
    errors = [error(backend, prefill, SpectralStorage(bases_path, None, bits, recent=20)) for bits in (5, 3, 1.5)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] < errors[2] < 0.8


@pytest.mark.parametrize("ratio", [3, 5])
def test_the_ratio_is_met_by_the_bytes_of_the_buffers(backend, prefill, bases_path, ratio):
    storage = SpectralStorage(bases_path, ratio, recent=20)
    cache = backend.compress(prefill, None, storage)
    assert cache.nbytes == storage.nbytes_together(300, 2, 2, 16, 4)
    in_16_bits = sum(x.nbytes for x in (*prefill.keys, *prefill.values)) / 2  # they are in 32 here
    assert 0.95 * in_16_bits / ratio < cache.nbytes <= in_16_bits / ratio


def test_results_do_not_depend_on_how_tokens_came(backend, prefill, bases_path, rng):
    storage = SpectralStorage(bases_path, None, 3, recent=20, flush=16)
    fed = rng.integers(2, 8000, size=40)
    caches = [backend.compress(prefill, None, storage) for _ in range(2)]
    positions = []
    for cache, chunk in zip(caches, (40, 5), strict=True):
        for start in range(0, 40, chunk):
            backend.extend(cache, fed[start : start + chunk])
        group = cache.layers[0].stored.group
        positions.append(group.coded_positions)
        assert group.recent[0][0].shape[-2] == group.recent[1][0].shape[-2] == 20 + 40 % 16
        assert cache.position == 340 and cache.layers[1].held == 340
    np.testing.assert_array_equal(*positions)
    assert caches[0].nbytes == caches[1].nbytes


def test_a_copy_goes_its_own_way(backend, prefill, bases_path, rng):
    cache = backend.compress(prefill, None, SpectralStorage(bases_path, None, 3, recent=20, flush=16))
    fed = rng.integers(2, 8000, size=60)
    twin = cache.copy()
    ours = [backend.extend(cache, fed[:30]).logits]
    theirs = [backend.extend(twin, fed[:30]).logits]
    ours.append(backend.extend(cache, fed[30:]).logits)
    theirs.append(backend.extend(twin, fed[30:]).logits)
    torch.testing.assert_close(ours, theirs)


def test_logits_follow_the_full_cache_at_high_rate(backend, prefill, bases_path):
    fed = np.arange(10, 20)
    full = backend.extend(backend.compress(prefill, None, Dense()), fed).logits
    near, far = (
        backend.extend(backend.compress(prefill, None, SpectralStorage(bases_path, None, bits, recent=20)), fed).logits
        for bits in (5, 1.5)
    )
    assert (near - full).norm() < 0.5 * (far - full).norm()


def test_equal_sequences_are_coded_alike(backend, prefill, bases_path):
    cache = backend.compress(prefill, None, SpectralStorage(bases_path, 5, recent=20), batch=2)
    keys, _ = cache.layers[1].stored.load()
    assert keys.shape[0] == 2
    torch.testing.assert_close(keys[0], keys[1])


def test_eviction_is_refused(backend, prefill, bases_path):
    kept = [torch.arange(50).expand(2, 50)] * 2
    with pytest.raises(ValueError, match="keeps every token"):
        backend.compress(prefill, kept, SpectralStorage(bases_path))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"ratio": None}, "give one of them"),
        ({"ratio": 0.5}, "above 1"),
        ({"ratio": None, "bits": 9}, "at most 6"),
        ({"flush": 0}, "flush=0"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralStorage("bases.safetensors", **settings)


def test_a_ratio_that_the_exact_tokens_rule_out_is_refused(backend, prefill, bases_path):
    with pytest.raises(ValueError, match="can't be met"):
        backend.compress(prefill, None, SpectralStorage(bases_path, 30))


@pytest.mark.parametrize("recent", [20, 400])
def test_a_cache_has_memory_of_its_own(backend, prefill, bases_path, recent):
    """Whether tokens were coded or all stay exact: what was given may change or go."""
    pairs = [[x[None].clone() for x in pair] for pair in zip(prefill.keys, prefill.values, strict=True)]
    storage = SpectralStorage(bases_path, None, 3, recent=recent)
    stored = storage.store_together(*zip(*pairs, strict=True), np.arange(300), 300, backend.rope)
    before = [x.clone() for tokens in stored for x in tokens.load()]
    for x in (x for pair in pairs for x in pair):
        x.zero_()
    assert all(torch.equal(x, y) for x, y in zip(before, (x for s in stored for x in s.load()), strict=True))
    if recent == 20:
        exact = [x for group in {id(s.group): s.group for s in stored}.values() for x in group.first + group.recent]
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for pair in exact for x in pair}
        assert sum(held.values()) == 2 * 2 * 2 * 16 * 4 * (4 + 20)


def test_few_steps_are_given_to_a_gpu(backend, prefill, bases_path, monkeypatch):
    """A host starts each of them, which takes longer than most of what they do."""

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            self.count += not function.is_view and "empty" not in str(function)
            return found

    storage = SpectralStorage(bases_path, None, 3, recent=20)
    monkeypatch.setattr(xp, "on_accelerator", lambda x: True)
    backend.compress(prefill, None, storage)  # constants are there
    classes = sum(len(coder.classes) for coder in storage.rate(300, (2, 2, 16), 4).coders)
    with Launches() as launches:
        backend.compress(prefill, None, storage)
    assert 0 < launches.count < 30 + 10 * classes
