import numpy as np
import pytest

from spectral_kv.at_rest.content import AtRest


@pytest.fixture
def cache(rng):
    return AtRest({"tokens": 7, "step": 0.1}, {"a.words": rng.integers(0, 99, 50).astype(np.uint32), "b": np.zeros(3)})


def test_bytes_give_it_back(cache):
    found = AtRest.from_bytes(cache.to_bytes())
    assert found.header == cache.header and set(found.tensors) == set(cache.tensors)
    np.testing.assert_array_equal(found.part("a")["words"], cache.tensors["a.words"])


def test_bytes_of_another_version_are_refused_in_one_sentence(cache, monkeypatch):
    monkeypatch.setattr("spectral_kv.at_rest.content.FORMAT", "spectral_kv cache at rest 1")
    old = cache.to_bytes()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"in format '.* 1', this version reads '.* 2': encode it again"):
        AtRest.from_bytes(old)


def test_damaged_bytes_are_refused_in_one_sentence(cache, rng):
    whole = cache.to_bytes()
    damaged = [whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.999)]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :] for at in range(0, len(whole), 3)
    ]
    accepted = 0
    for content in damaged:
        try:
            found = AtRest.from_bytes(content)
        except ValueError as error:
            assert str(error).startswith("these bytes are") and "\n" not in str(error)
        else:  # a space of the header, say, which holds nothing
            accepted += 1
            assert found.header == cache.header
            assert all(np.array_equal(x, found.tensors[name]) for name, x in cache.tensors.items())
    assert accepted < 0.05 * len(damaged)
