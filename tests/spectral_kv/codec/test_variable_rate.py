import numpy as np
import pytest

from spectral_kv.codec.variable_rate import Components, Rounded, Rounding, VariableRate, means

pytest.importorskip("constriction")


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
    plain = np.rint(there).astype(np.int32)
    levels = rounded.sizes.levels[rounded.sizes.there]
    nearest = Rounded(rounded.sizes, plain, means(there, plain, levels, 1.0))
    cost = [r.distortion(components.values, 1.0) + 0.1155 * r.bits / 3000 for r in (rounded, nearest)]
    assert cost[0] < 0.99 * cost[1]
    assert rounded.bits < nearest.bits
    assert (Rounding().least > 0.5).all()


def test_numbers_stand_for_the_mean_of_what_was_rounded_to_them(blocks):
    components = Components(blocks)
    rounded = components.rounded(1.0)
    bare = Rounded(rounded.sizes, rounded.numbers, np.full((2, 64), 120, dtype=np.uint8))  # as they are
    assert rounded.distortion(components.values, 1.0) < 0.999 * bare.distortion(components.values, 1.0)


def test_components_that_are_nothing_take_nothing(blocks):
    with_nothing = [np.concatenate([y, 1e-3 * y], axis=1) for y in blocks]
    less, more = (VariableRate.of(Components(y), 2.0, 3000) for y in (blocks, with_nothing))
    assert (more.levels == 0).sum() >= 160
    assert more.words.nbytes < 1.02 * less.words.nbytes
