import pytest

from spectral_kv.backends import torch_bases
from spectral_kv.backends.torch_bases import measure


class Interrupted(Exception):
    pass


def stopping(after):
    """Windows of which only the first ones are reached."""

    def windows(given):
        yield from given[:after]
        raise Interrupted

    return windows


@pytest.fixture
def windows(rng):
    return [rng.integers(2, 8000, size=90) for _ in range(3)]


def test_a_measurement_that_was_broken_off_goes_on(backend, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_bases, "OFTEN", -1)
    settings, sums = {"prompt": 80, "group": 1, "following": 10, "model": "a"}, tmp_path / "b.sums"
    with pytest.raises(Interrupted):
        measure(backend, windows, sums=sums, progress=stopping(2), **settings)
    fed = []
    monkeypatch.setattr(torch_bases, "gradients", lambda *a, own=torch_bases.gradients: fed.append(a[-1]) or own(*a))
    found = measure(backend, windows, sums=sums, **settings)
    assert fed == [2] and not list(tmp_path.iterdir())
    assert found.digest == measure(backend, windows, **settings).digest
    assert found.metadata["tokens"] == "228"


def test_another_measurement_begins_anew(backend, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_bases, "OFTEN", -1)
    settings, sums = {"prompt": 80, "group": 1, "following": 10}, tmp_path / "b.sums"
    with pytest.raises(Interrupted):
        measure(backend, windows, sums=sums, progress=stopping(2), **settings)
    others = [windows[2], windows[0]]
    assert measure(backend, others, sums=sums, **settings).digest == measure(backend, others, **settings).digest
    sums.write_bytes(b"no sums")
    assert measure(backend, others, sums=sums, **settings).digest == measure(backend, others, **settings).digest
