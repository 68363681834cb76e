from dataclasses import replace

import numpy as np
import pytest

from spectral_kv.codec.entropy import histogram
from spectral_kv.codec.variable_rate import (
    CONTEXTS,
    GAIN,
    Components,
    Places,
    Rounded,
    Rounding,
    Sizes,
    VariableRate,
    means,
)



@pytest.fixture
def blocks(rng):
    """Components of two blocks, of falling size, in tokens of different sizes and with heavy tails."""
    return [
        (rng.laplace(size=(3000, n)) * np.geomspace(8, 0.02, n) * rng.lognormal(0, 0.7, (3000, 1))).astype(np.float32)
        for n in (96, 64)
    ]


def test_errors_are_those_of_a_step(blocks):
    components = Components(blocks)
    written = VariableRate.of(components, 0.5, 256)
    found = written.decode(3000, components.block, 0, 3000)
    error = found - components.values
    assert np.abs(error).max() < 0.75  # what is rounded down lies less than a step above
    large = np.abs(components.values) > 5
    assert 0.8 * 0.5**2 / 12 < (error[large] ** 2).mean() < 1.5 * 0.5**2 / 12
    assert components.rounded(0.5).distortion(components.values, 0.5) == pytest.approx(
        (error**2).sum(axis=1).mean(), rel=1e-4
    )


def test_bytes_are_within_3_percent_of_the_order_0_entropy(rng):
    sizes = np.geomspace(8, 0.02, 300) * rng.lognormal(0, 0.5, (1500, 1))
    components = Components([(rng.laplace(size=(1500, 300)) * sizes).astype(np.float32)])
    for step in (0.3, 2.0):
        written, rounded = VariableRate.of(components, step, 1500), components.rounded(step)
        assert 8 * written.words.nbytes < 1.03 * rounded.order_0
        assert abs(8 * written.words.nbytes - rounded.bits) < 0.005 * rounded.bits + 256


def test_most_numbers_are_zero_and_are_counted_without_being_looked_at(blocks):
    """What is found by comparisons is what the definition says of every number."""
    components = Components(blocks)
    rounded = components.rounded(2.0)
    contexts, numbers = rounded.sizes.contexts(), rounded.numbers
    levels, gains = rounded.sizes.levels[rounded.sizes.there], rounded.sizes.gains
    sums = levels.astype(int) + gains[:, components.block[rounded.sizes.there]]
    np.testing.assert_array_equal(contexts, sums.clip(0, 63))
    np.testing.assert_array_equal(rounded.sizes.often, np.bincount(contexts.ravel(), minlength=64))
    np.testing.assert_array_equal(rounded.frequencies, histogram(numbers, contexts, 64))
    rounding = Rounding()
    rounding.learn(rounded.frequencies)
    size = np.abs(components.values) * np.float32(0.5)
    own = rounded.sizes.levels
    expected = np.floor(size + rounding.below[own]) * (size >= rounding.least[own]) * (own > 0)
    row, column, number = rounding(np.abs(components.values), 2.0, own)
    found = np.zeros_like(expected)
    found[row, column] = number
    np.testing.assert_array_equal(found, expected)
    assert 0 < (found > 0).mean() < 0.5


@pytest.mark.parametrize("step", [0.02, 2.0, 500.0])
def test_words_are_those_of_numbers_sorted_by_context(blocks, step):
    """Nothing is sorted on the way; nearly all, few and none of the numbers are not zero, and contexts end at both."""
    blocks[0][100:150] *= 1e-3
    blocks[1][700:720] *= 50
    components = Components(blocks)
    written, rounded = VariableRate.of(components, step, 256), components.rounded(step)
    numbers, contexts, gains = rounded.numbers, rounded.sizes.contexts(), rounded.sizes.gains
    words = []
    for start in range(0, 3000, 256):
        part = slice(start, start + 256)
        own = gains[part].ravel()
        words.append(written.gain_tables.encode(own, np.zeros(len(own), dtype=np.uint8)))
        words.append(written.tables.encode(numbers[part].ravel(), contexts[part].ravel()))
    np.testing.assert_array_equal(written.ends.ravel(), np.cumsum([len(w) for w in words]))
    np.testing.assert_array_equal(written.words, np.concatenate(words))


def test_places_are_those_of_a_stable_sort_at_both_ends_of_the_contexts(rng):
    levels, block = np.sort(rng.integers(0, CONTEXTS, size=40)).astype(np.uint8), np.repeat([0, 1], 20)
    sizes = Sizes(levels, rng.integers(-GAIN, GAIN + 1, size=(30, 2)).astype(np.int8), block)
    token, column = map(np.ravel, np.indices((30, len(sizes.there))))
    contexts = sizes.contexts().ravel()
    assert {0, 1, CONTEXTS - 1} <= set(contexts.tolist())
    found, edges = Places(sizes)(sizes.gains, token, block[sizes.there][column], column, contexts.astype(np.int32))
    np.testing.assert_array_equal(np.argsort(found), np.argsort(contexts, kind="stable"))
    np.testing.assert_array_equal(np.diff(edges), np.bincount(contexts, minlength=CONTEXTS))


def test_nothing_that_is_rounded_is_zero_or_of_level_0():
    """Whatever was learnt: a bound for 1 below what begins a 1 brings no zeros in."""
    rounding = Rounding()
    rounding.least[:], rounding.below[:] = 0.5, 0.3
    components = np.array([[0.6, -0.8, 1.6, 9.0], [-0.6, 0.8, -2.8, -9.0]], dtype=np.float32)
    row, column, number = rounding(components, 1.0, np.array([5, 5, 5, 0]))
    assert list(zip(row.tolist(), column.tolist(), number.tolist(), strict=True)) == [
        (0, 1, -1), (0, 2, 1), (1, 1, 1), (1, 2, -3),
    ]  # fmt: skip


def test_what_has_no_size_is_refused(blocks):
    with pytest.raises(ValueError, match=r"step=1e-09 is finer than single precision"):
        Components(blocks).rounded(1e-9)
    blocks[1][5, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        Components(blocks).rounded(1.0)


def test_sizes_of_tokens_save_bits(blocks, rng):
    rounded = Components(blocks).rounded(0.5)
    shuffled = Components([rng.permuted(y, axis=0) for y in blocks]).rounded(0.5)
    assert rounded.bits < 0.97 * shuffled.bits


def test_a_chunk_is_read_alone(blocks):
    components = Components(blocks)
    written = VariableRate.of(components, 0.5, 128)
    whole = written.decode(3000, components.block, 0, 3000)
    broken = VariableRate(**{**vars(written), "words": written.words.copy()})
    broken.words[: written.ends[0, 1]] = 0
    broken.words[written.ends[2, 1] :] = 0
    np.testing.assert_array_equal(broken.decode(3000, components.block, 130, 384), whole[130:384])
    np.testing.assert_array_equal(written.decode(3000, components.block, 2990, 3000), whole[2990:])


def test_numbers_give_way_where_they_cost_more_than_they_are_worth(blocks):
    components = Components(blocks)
    rounded = components.rounded(1.0)
    there = components.values[:, rounded.sizes.there]
    row, column = np.nonzero(np.rint(there))
    plain = np.rint(there)[row, column].astype(np.int32)
    levels = rounded.sizes.levels[rounded.sizes.there][column]
    nearest = Rounded(rounded.sizes, row, column, plain, means(np.abs(there)[row, column], np.abs(plain), levels))
    cost = [r.distortion(components.values, 1.0) + 0.1155 * r.bits / 3000 for r in (rounded, nearest)]
    assert cost[0] < 0.99 * cost[1]
    assert rounded.bits < nearest.bits
    assert (Rounding().least > 0.5).all()


def test_numbers_stand_for_the_mean_of_what_was_rounded_to_them(blocks):
    components = Components(blocks)
    rounded = components.rounded(1.0)
    bare = replace(rounded, means=np.full((2, 64), 120, dtype=np.uint8))  # as they are
    assert rounded.distortion(components.values, 1.0) < 0.999 * bare.distortion(components.values, 1.0)


def test_components_that_are_nothing_take_nothing(blocks):
    with_nothing = [np.concatenate([y, 1e-3 * y], axis=1) for y in blocks]
    less, more = (VariableRate.of(Components(y), 2.0, 3000) for y in (blocks, with_nothing))
    assert (more.levels == 0).sum() >= 160
    assert more.words.nbytes < 1.02 * less.words.nbytes
