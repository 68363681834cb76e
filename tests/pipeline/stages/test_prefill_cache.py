"""Prefills on disk: the same to the bit, bounded, and never trusted when they are damaged."""

import os

import numpy as np
import pytest

from pipeline import run as application
from pipeline.stages.prefill_cache import PrefillCache

WHAT = {"model": "a", "dtype": "float32"}


@pytest.fixture
def cache(tmp_path) -> PrefillCache:
    return PrefillCache(tmp_path / "prefill", 10**9, 0.5, WHAT)


def prefilled(backend, seed: int = 0, observe: int = 4):
    return backend.prefill(np.random.default_rng(seed).integers(2, 8000, size=60), observe)


def same(a, b) -> bool:
    pairs = zip((*a.keys, *a.values, *a.queries, a.logits), (*b.keys, *b.values, *b.queries, b.logits), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all()) for x, y in pairs)


def test_what_comes_back_is_what_went_in(backend, cache):
    prefill = prefilled(backend)
    assert cache.get(prefill.tokens, 4, "cpu") is None
    cache.put(prefill, 1.5)
    again, seconds = cache.get(prefill.tokens, 4, "cpu")
    assert same(prefill, again) and seconds == 1.5
    assert cache.get(prefill.tokens, 5, "cpu") is None  # fewer queries than are asked for
    assert cache.get(prefilled(backend, seed=1).tokens, 4, "cpu") is None
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]  # no draft is left


def test_everything_that_determines_a_prefill_is_in_its_name(backend, cache):
    prefill = prefilled(backend)
    cache.put(prefill, 1.0)
    for change in ({"model": "b"}, {"dtype": "bfloat16"}, {"device": "cuda"}):
        assert PrefillCache(cache.folder, cache.limit, 0.5, WHAT | change).get(prefill.tokens, 4, "cpu") is None


@pytest.mark.parametrize("damage", ["truncated", "a bit flipped", "empty", "another file's"])
def test_damage_is_found_reported_and_rebuilt(backend, cache, caplog, damage):
    prefill = prefilled(backend)
    cache.put(prefill, 1.0)
    path = cache.path(prefill.tokens)
    content = bytearray(path.read_bytes())
    if damage == "a bit flipped":
        content[-100] ^= 1
    path.write_bytes(
        {"truncated": content[:-1], "empty": b"", "another file's": b"PK\x03\x04" * 50}.get(damage, content)
    )
    assert cache.get(prefill.tokens, 4, "cpu") is None
    assert f"{path} is damaged" in caplog.text and "run again" in caplog.text
    cache.put(prefill, 1.0)
    assert same(prefill, cache.get(prefill.tokens, 4, "cpu")[0])


def test_the_least_recently_used_go_first(backend, cache):
    prefills = [prefilled(backend, seed) for seed in range(4)]
    for age, prefill in enumerate(prefills[:3]):
        cache.put(prefill, 1.0)
        os.utime(cache.path(prefill.tokens), (1000 + age, 1000 + age))
    assert cache.get(prefills[0].tokens, 4, "cpu") is not None  # used now
    size = cache.path(prefills[0].tokens).stat().st_size
    bounded = PrefillCache(cache.folder, 3 * size, 0.5, WHAT)
    bounded.put(prefills[3], 1.0)
    there = [bounded.path(p.tokens).is_file() for p in prefills]
    assert there == [True, False, True, True]
    assert PrefillCache(cache.folder, 10, 0.5, WHAT).put(prefilled(backend, 9), 1.0) is None  # larger than the bound
    assert len(bounded.files()) == 3


def test_a_folder_that_takes_nothing_stops_no_run(backend, cache, caplog, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    cache.put(prefilled(backend), 1.0)
    assert "can't be kept" in caplog.text and list(cache.folder.iterdir()) == []


def test_what_was_quick_is_not_written(backend, cache):
    cache.put(prefilled(backend), 0.4)
    assert not cache.folder.exists()


def test_a_run_from_disk_has_the_same_numbers(run):
    options = ["document.tokens=220", "method=snapkv", "prefill_cache_least_s=0"]
    fresh = run(*options)
    assert fresh.metrics["prefill/computed"] == 3
    application._full_runs.clear()  # as in another process
    loaded = run(*options, "force=true")
    assert (loaded.metrics["prefill/loaded"], loaded.metrics["prefill/computed"]) == (3, 0)
    numbers = {name for name in fresh.metrics if not name.startswith(("time/", "prefill/"))}
    assert {n: loaded.metrics[n] for n in numbers} == {n: fresh.metrics[n] for n in numbers}
    assert loaded.metrics["time/prefill_s"] == pytest.approx(fresh.metrics["time/prefill_s"], abs=1e-5)


def test_a_method_that_wants_more_queries_replaces_the_file(run, tmp_path):
    options = ["document.tokens=230", "prefill_cache_least_s=0"]
    run(*options, "method=random")
    application._full_runs.clear()
    assert run(*options, "method=h2o").metrics["prefill/computed"] == 3
    application._full_runs.clear()
    assert run(*options, "method=tova").metrics["prefill/loaded"] == 3
    assert len(list((tmp_path / "outputs" / "cache" / "prefill").iterdir())) == 3
