from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.at_rest.counting import counts
from spectral_kv.at_rest.entropy import CAP, WIDTH, folded, histogram
from spectral_kv.at_rest.rounding import CONTEXTS, GAINS, Components, Rounding, fill, means, values
from spectral_kv.at_rest.variable_rate import VariableRate


def components(blocks: list[np.ndarray]) -> Components:
    """Of blocks `[tokens, components]`."""
    joined = torch.from_numpy(np.ascontiguousarray(np.concatenate(blocks, axis=1).T))
    return Components(joined, np.repeat(np.arange(len(blocks)), [y.shape[1] for y in blocks]))


def read(written: VariableRate, of: Components, start: int, stop: int) -> torch.Tensor:
    return written.decode(of.tokens, of.block, start, stop, of.values)


@pytest.fixture
def blocks(rng):
    """Components of two blocks, of falling size, in tokens of different sizes and with heavy tails."""
    return [
        (rng.laplace(size=(3000, n)) * np.geomspace(8, 0.02, n) * rng.lognormal(0, 0.7, (3000, 1))).astype(np.float32)
        for n in (96, 64)
    ]


def test_errors_are_those_of_a_step(blocks):
    own = components(blocks)
    written = VariableRate.of(own, 0.5, 256)
    error = (read(written, own, 0, 3000) - own.values).numpy()
    assert np.abs(error).max() < 0.75  # what is rounded down lies less than a step above
    large = np.abs(own.values.numpy()) > 5
    assert 0.8 * 0.5**2 / 12 < (error[large] ** 2).mean() < 1.5 * 0.5**2 / 12
    assert own.rounded(0.5).distortion(own.values, 0.5) == pytest.approx((error**2).sum(axis=0).mean(), rel=1e-4)


def test_bytes_are_within_3_percent_of_the_order_0_entropy(rng):
    sizes = np.geomspace(8, 0.02, 300) * rng.lognormal(0, 0.5, (1500, 1))
    own = components([(rng.laplace(size=(1500, 300)) * sizes).astype(np.float32)])
    for step in (0.3, 2.0):
        written, rounded = VariableRate.of(own, step, 1500), own.rounded(step)
        assert 8 * (written.words.nbytes + written.states.nbytes) < 1.03 * rounded.order_0
        assert abs(8 * written.words.nbytes - rounded.bits) < 0.005 * rounded.bits + 16 * len(written.states)


@pytest.mark.parametrize("step", [0.02, 2.0, 500.0])
def test_numbers_contexts_and_counts_are_those_of_the_definition(blocks, step):
    """Nearly all, few and none of the numbers are not zero, and contexts end at both ends."""
    blocks[0][100:150] *= 1e-3
    blocks[1][700:720] *= 50
    own = components(blocks)
    rounded, rounding = own.rounded(step), Rounding()
    sizes, numbers = rounded.sizes, rounded.numbers().numpy()
    levels = sizes.levels[sizes.there]
    contexts = (levels[:, None].astype(int) + sizes.gains.numpy()[own.block[sizes.there]]).clip(0, CONTEXTS - 1)
    np.testing.assert_array_equal(sizes.contexts().numpy(), contexts)
    rows = rounded.rows.numpy()
    np.testing.assert_array_equal(rows[:2], GAINS * WIDTH + CAP + sizes.gains.numpy().astype(int))
    np.testing.assert_array_equal(rows[2:], contexts * WIDTH + CAP + numbers.clip(-CAP, CAP))
    np.testing.assert_array_equal(rounded.frequencies[:-1], histogram(numbers, contexts, CONTEXTS))
    assert rounded.frequencies[-1].sum() == 2 * 3000 and rounded.frequencies[-1, 13:].sum() == 0

    few = own.values.numpy()[sizes.there][:, :: 3000 // 256 | 1]
    for _ in range(2):
        met = rounding(torch.from_numpy(few), step, levels).numpy()
        rounding.learn(histogram(met, np.broadcast_to(levels[:, None], met.shape), CONTEXTS))
    size = np.abs(own.values.numpy()[sizes.there]) * np.float32(1 / step)
    least, below = rounding.least[levels][:, None], rounding.below[levels][:, None]
    expected = np.floor(size + below) * (size >= least) * np.sign(own.values.numpy()[sizes.there])
    np.testing.assert_array_equal(numbers, expected)
    assert {0.02: 0.6, 2.0: 0.05, 500.0: 0}[step] <= (numbers != 0).mean() <= {0.02: 1, 2.0: 0.5, 500.0: 1e-3}[step]


def test_words_do_not_depend_on_how_many_components_are_looked_at_at_a_time(blocks, monkeypatch):
    written = []
    for numbers in (2**17, 3000):
        monkeypatch.setattr("spectral_kv.at_rest.counting.PART", numbers)
        written.append(VariableRate.of(components(blocks), 0.5, 256))
    for name in ("levels", "means", "words", "states", "far", "ends"):
        np.testing.assert_array_equal(*(getattr(w, name) for w in written))


def test_the_kernel_of_a_gpu_rounds_and_counts_alike(rng, monkeypatch):
    kernels = pytest.importorskip("spectral_kv.at_rest.rounding_kernels", reason="needs Triton")
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(kernels, "TILES", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = components([(rng.laplace(size=(300, 20)) * np.geomspace(300, 0.02, 20)).astype(np.float32)] * 2)
    sizes, rounding = own.rounded(0.5).sizes, Rounding()
    there, levels = sizes.there, sizes.levels[sizes.there]
    rounding.least[:] = np.geomspace(0.5, 1.0, CONTEXTS)
    wanted, found = (torch.empty((len(there), 300), dtype=torch.int16) for _ in range(2))
    met = fill(wanted, own.values, sizes, rounding, 0.5)
    bounds = (torch.from_numpy(x[levels]).to(device) for x in (rounding.least, rounding.below))
    given = [x.to(device) for x in (*sizes.placed, *bounds)]
    found = found.to(device)
    values, gains = own.values.to(device), sizes.gains.to(device)
    counted = kernels.rounded(values, *given, gains, found, CONTEXTS, 12, 2.0)
    assert torch.equal(found.cpu(), wanted)
    np.testing.assert_array_equal(counted.cpu(), met)
    assert met[:, CAP].sum() > 50  # numbers beyond the tables


def test_nothing_that_is_rounded_is_zero_or_of_level_0():
    """Whatever was learnt: a bound for 1 below what begins a 1 brings no zeros in."""
    rounding = Rounding()
    rounding.least[:], rounding.below[:] = 0.5, 0.3
    own = torch.tensor([[0.6, -0.8, 1.6, 9.0], [-0.6, 0.8, -2.8, -9.0]])
    assert rounding(own, 1.0, np.array([5, 5])).tolist() == [[0, -1, 1, 9], [0, 1, -3, -9]]
    rounding.least[:] = 0.8
    assert rounding(own, 1.0, np.array([5, 5]))[0, 1] == -1  # what is as large as the bound
    assert (components([np.array([[0.3], [-0.4]], dtype=np.float32)]).levels(1.0) == 0).all()


def test_what_has_no_size_is_refused(blocks):
    with pytest.raises(ValueError, match=r"step=1e-09 is finer than single precision"):
        components(blocks).rounded(1e-9)
    blocks[1][5, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        components(blocks).rounded(1.0)


def test_sizes_of_tokens_save_bits(blocks, rng):
    rounded = components(blocks).rounded(0.5)
    shuffled = components([rng.permuted(y, axis=0) for y in blocks]).rounded(0.5)
    assert rounded.bits < 0.97 * shuffled.bits


def test_heavy_tails_come_back(rng):
    """Their tables hold many rare numbers."""
    own = components([(rng.standard_t(5, size=(2000, 200)) * 20).astype(np.float32)])
    written = VariableRate.of(own, 1.0, 256)
    assert (written.tables.frequencies >= 0).all()
    assert (read(written, own, 0, 2000) - own.values).abs().max() < 1.5


@pytest.mark.parametrize("step", [0.5, 0.01])  # without and with numbers beyond the tables
@pytest.mark.parametrize("chunk", [128, 100, 7])
def test_a_chunk_is_read_alone(blocks, chunk, step):
    own = components([y[:700] for y in blocks])
    written = VariableRate.of(own, step, chunk)
    whole = read(written, own, 0, 700)
    rounded = own.rounded(step)
    exact = torch.zeros_like(own.values)
    there = rounded.sizes.there
    exact[there] = values(rounded.numbers(), rounded.sizes.levels[there], written.means, step)
    assert torch.equal(whole, exact)
    assert (len(written.far) > 1000) == (step == 0.01)
    lanes = -(-chunk // 2)
    assert len(written.states) == 700 // chunk * lanes + min(700 % chunk, lanes), "none of lanes without a token"
    broken = VariableRate(**{**vars(written), "words": written.words.copy()})
    start, stop = 2 * chunk - 1, 3 * chunk
    broken.words[: written.ends[0, 0]] = 0
    broken.words[written.ends[2, 0] :] = 0
    assert torch.equal(read(broken, own, start, stop), whole[:, start:stop])
    assert torch.equal(read(written, own, 690, 700), whole[:, 690:])


def test_numbers_give_way_where_they_cost_more_than_they_are_worth(blocks):
    own = components(blocks)
    rounded = own.rounded(1.0)
    there, levels = own.values[rounded.sizes.there], rounded.sizes.levels[rounded.sizes.there]
    plain = there.round().clamp(-CAP, CAP)
    contexts = rounded.sizes.contexts().to(torch.int16)
    rows = torch.cat([rounded.rows[:2], contexts * WIDTH + CAP + plain.to(torch.int16)])
    nearest = replace(
        rounded, rows=rows, means=means(there.abs(), plain.abs(), levels),
        frequencies=folded(counts(rows, (CONTEXTS + 1) * WIDTH).reshape(-1, WIDTH)),
    )  # fmt: skip
    cost = [r.distortion(own.values, 1.0) + 0.1155 * r.bits / 3000 for r in (rounded, nearest)]
    assert cost[0] < 0.99 * cost[1]
    assert rounded.bits < nearest.bits
    assert (Rounding().least > 0.5).all()


def test_numbers_stand_for_the_mean_of_what_was_rounded_to_them(blocks):
    own = components(blocks)
    rounded = own.rounded(1.0)
    bare = replace(rounded, means=np.full((2, 64), 120, dtype=np.uint8))  # as they are
    assert rounded.distortion(own.values, 1.0) < 0.999 * bare.distortion(own.values, 1.0)


def test_components_that_are_nothing_take_nothing(blocks):
    with_nothing = [np.concatenate([y, 1e-3 * y], axis=1) for y in blocks]
    less, more = (VariableRate.of(components(y), 2.0, 3000) for y in (blocks, with_nothing))
    assert (more.levels == 0).sum() >= 160
    assert more.words.nbytes < 1.02 * less.words.nbytes
