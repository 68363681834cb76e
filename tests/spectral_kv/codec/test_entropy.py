import numpy as np
import pytest

from spectral_kv.codec.entropy import CAP, Tables, entropy, histogram



@pytest.fixture
def coded(rng):
    """Numbers of 20 contexts of growing size, a few of them beyond all tables."""
    contexts = rng.integers(0, 20, 40_000).astype(np.uint8)
    numbers = np.rint(rng.laplace(size=40_000) * 2.0 ** (contexts / 3 - 3)).astype(np.int32)
    numbers[:3] = 5 * CAP, -CAP, CAP + 1
    return numbers, contexts, Tables.of(histogram(numbers, contexts, 24))


def test_what_is_decoded_is_what_was_coded(coded):
    numbers, contexts, tables = coded
    words = tables.encode(numbers, contexts)
    np.testing.assert_array_equal(tables.decode(words, contexts), numbers)
    again = Tables(tables.codes.copy(), tables.lengths.copy())  # as read from a file
    np.testing.assert_array_equal(again.decode(words, contexts), numbers)


def test_bytes_are_those_of_the_entropy(coded):
    numbers, contexts, tables = coded
    bits = 8 * tables.encode(numbers, contexts).nbytes
    by_hand = 0.0
    for context in range(20):
        own = numbers[contexts == context]
        _, counts = np.unique(own, return_counts=True)
        by_hand -= (counts * np.log2(counts / len(own))).sum()
    assert abs(bits - entropy(histogram(numbers, contexts, 24))) < 0.002 * bits
    assert abs(bits - by_hand) < 0.01 * bits  # signs are equally likely in a table, and nearly so here
    assert tables.nbytes < 4000


def test_contexts_save_bits(coded):
    numbers, contexts, tables = coded
    alike = np.zeros_like(contexts)
    one = Tables.of(histogram(numbers, alike, 1))
    assert tables.encode(numbers, contexts).nbytes < 0.93 * one.encode(numbers, alike).nbytes


def test_nothing_and_zeros_alone():
    contexts = np.zeros(5, dtype=np.uint8)
    zeros = np.zeros(5, dtype=np.int32)
    tables = Tables.of(histogram(zeros, contexts, 2))
    np.testing.assert_array_equal(tables.decode(tables.encode(zeros, contexts), contexts), zeros)
    none = tables.decode(tables.encode(zeros[:0], contexts[:0]), contexts[:0])
    assert none.shape == (0,)
