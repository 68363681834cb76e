import numpy as np
import pytest

from spectral_kv.at_rest.entropy import CAP, WHOLE, WIDTH, Tables, entropy, folded, histogram


@pytest.fixture
def counted(rng):
    """Numbers of 20 contexts of growing size, a few of them beyond all tables, and their histogram in 24 contexts."""
    contexts = rng.integers(0, 20, 40_000).astype(np.uint8)
    numbers = np.rint(rng.laplace(size=40_000) * 2.0 ** (contexts / 3 - 3)).astype(np.int32)
    numbers[:3] = 5 * CAP, -CAP, CAP + 1
    return numbers, contexts, histogram(numbers, contexts, 24)


def test_frequencies_are_whole_and_those_of_the_numbers(counted):
    numbers, contexts, met = counted
    tables = Tables.of(met)
    found = tables.frequencies
    assert found.shape == (25, WIDTH) and tables.nbytes < 4000
    assert (found[:20].sum(axis=1) == WHOLE).all() and not found[20:24].any()
    assert found[24, CAP] == WHOLE  # the context that knows nothing but 0
    clipped = np.clip(numbers, -CAP, CAP)
    assert (found[contexts, CAP + clipped] > 0).all()
    bits = -np.log2(found[contexts, CAP + clipped] / WHOLE).sum() + 32 * (np.abs(numbers) >= CAP).sum()
    by_hand = 0.0
    for context in range(20):
        _, counts = np.unique(numbers[contexts == context], return_counts=True)
        by_hand -= (counts * np.log2(counts / counts.sum())).sum()
    assert abs(bits - entropy(met)) < 0.003 * bits
    assert abs(bits - by_hand) < 0.01 * bits  # signs are equally likely in a table, and nearly so here


@pytest.mark.parametrize("often", [9, 90, 1000, 30_000])
@pytest.mark.parametrize("flat", [1, 20, 60, 101, 150])
def test_many_rare_numbers_take_from_the_largest_no_more_than_they_have(often, flat):
    """As in heavy tails: each has one place at least, and where they are many that is far more than their share."""
    met = np.ones((1, CAP + 1), dtype=int)
    met[0, :flat] = often
    tables = Tables.of(met)
    found = tables.frequencies[0]
    assert found.sum() == WHOLE and found.min() >= 1
    assert tables.slots.shape == (2 * WHOLE,)
    share = np.append(met[0, :0:-1] / 2, met[0]) / np.append(np.ones(CAP), [1, *np.full(CAP, 2)]) / met.sum()
    assert -(share * np.log2(found / WHOLE)).sum() < -(share * np.log2(share)).sum() + 0.2


def test_every_place_of_a_table_belongs_to_the_number_that_has_it(counted):
    tables = Tables.of(counted[2])
    again = Tables(tables.codes.copy(), tables.lengths.copy())  # as read from a file
    for context in (0, 7, 19, 24):
        place = np.arange(WHOLE)
        number = again.numbers[context * WHOLE + place]
        entry = tables.entries[context * WIDTH + CAP + number]
        frequency, before = entry & 0xFFFF, entry >> 16
        assert ((before <= place) & (place < before + frequency)).all()
        slot = again.slots[context * WHOLE + place]
        np.testing.assert_array_equal(slot & 0xFFFF, frequency)
        np.testing.assert_array_equal(slot >> 16, place - before)


def test_dividing_by_a_frequency_is_multiplying_by_its_inverse(counted, rng):
    tables = Tables.of(counted[2])
    frequency = np.maximum(tables.entries & 0xFFFF, 1).astype(np.int64)
    for quotient in rng.integers(0, 2**19, 50):
        for rest in (np.zeros_like(frequency), frequency - 1):
            state = np.minimum(quotient * frequency + rest, 2**31 - 1)
            np.testing.assert_array_equal((state * tables.inverses).astype(np.int64), state // frequency)


def test_signs_are_folded():
    counts = np.zeros((2, WIDTH), dtype=np.int64)
    counts[1, [0, CAP - 1, CAP, CAP + 1, 2 * CAP]] = 1, 2, 3, 4, 5
    found = folded(counts)
    assert found[1, :2].tolist() == [3, 6] and found[1, CAP] == 6 and found.sum() == 15


def test_contexts_save_bits(counted):
    numbers, contexts, met = counted
    assert entropy(met) < 0.93 * entropy(histogram(numbers, np.zeros_like(contexts), 1))


@pytest.mark.parametrize("met", [np.zeros((2, CAP + 1), dtype=int), np.eye(2, CAP + 1, dtype=int)])
def test_nothing_and_zeros_alone(met):
    found = Tables.of(met).frequencies
    np.testing.assert_array_equal(found.sum(axis=1), [WHOLE * x for x in (*met.any(axis=1), 1)])


def test_numbers_that_are_met_more_often_than_a_logarithm_says_are_the_most_likely():
    met = np.zeros((1, CAP + 1), dtype=np.int64)
    met[0, :3] = 2**40, 2**33, 2**20
    frequencies = Tables.of(met).frequencies[0, CAP:]
    assert frequencies[0] > frequencies[1] > 0.4 * frequencies[0] and frequencies[2] == 1
