import threading

import numpy as np
import pytest
import torch

from spectral_kv.at_rest import ans, threads
from spectral_kv.at_rest.rounding import Components
from spectral_kv.at_rest.variable_rate import VariableRate


def test_parts_come_back_in_their_order_from_several_threads(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    together = threading.Barrier(3, timeout=10)  # which one thread alone would never pass

    def found(part: int) -> int:
        together.wait()
        return part**2

    assert threads.each(found, range(3)) == [0, 1, 4]


@pytest.mark.parametrize("count", [2, 5])
def test_bytes_and_what_is_read_from_them_are_those_of_one_thread(monkeypatch, count):
    y = (np.random.default_rng(0).standard_normal((60, 1000)) * np.geomspace(5, 0.1, 60)[:, None]).astype(np.float32)
    y, block = torch.from_numpy(y), np.repeat([0, 1], 30)
    monkeypatch.setattr(ans, "TOGETHER", 200)
    monkeypatch.setattr(ans, "AHEAD", 100)
    written = []
    for cores in (1, count):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        coded = VariableRate.of(Components(y, block), 0.5, 128)
        written.append((coded.words, coded.ends, coded.decode(1000, block, 100, 900, y)))
    for one, other in zip(*written, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (written[0][2] - y[:, 100:900]).abs().max() < 0.5


def test_what_is_needed_later_is_found_by_a_second_thread_if_there_is_one(monkeypatch):
    for cores, worth in ((2, True), (2, False), (1, True)):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        with threads.Ahead(worth) as ahead:
            later = [ahead(lambda x: (x, threading.get_ident()), x) for x in range(3)]
            found = [x() for x in later]
        assert [x for x, _ in found] == [0, 1, 2]
        assert ({who for _, who in found} == {threading.get_ident()}) == (cores == 1 or not worth)
