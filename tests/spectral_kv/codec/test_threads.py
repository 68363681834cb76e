import threading

import numpy as np
import pytest

from spectral_kv.codec import threads
from spectral_kv.codec.variable_rate import Components, VariableRate


def test_parts_come_back_in_their_order_from_several_threads(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    together = threading.Barrier(3, timeout=10)  # which one thread alone would never pass

    def found(part: int) -> int:
        together.wait()
        return part**2

    assert threads.each(found, range(3)) == [0, 1, 4]


@pytest.mark.parametrize("count", [2, 5])
def test_bytes_and_what_is_read_from_them_are_those_of_one_thread(monkeypatch, count):
    y = (np.random.default_rng(0).standard_normal((1000, 60)) * np.geomspace(5, 0.1, 60)).astype(np.float32)
    written = []
    for cores in (1, count):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        coded = VariableRate.of(Components([y[:, :30], y[:, 30:]]), 0.5, 128)
        block = np.repeat([0, 1], 30)
        written.append((coded.words, coded.ends, coded.decode(1000, block, 100, 900)))
    for one, other in zip(*written, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(written[0][2] - y[100:900]).max() < 0.5
