from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.at_rest import rounding
from spectral_kv.at_rest.counting import counts
from spectral_kv.at_rest.entropy import CAP, WIDTH, folded, histogram
from spectral_kv.at_rest.rounding import (
    CONTEXTS,
    GAINS,
    Components,
    Rounding,
    Sizes,
    means,
    stand_for,
    values,
)  # fmt: skip
from tests.spectral_kv.at_rest.joined import components

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.mark.parametrize("level", [11, 12, 13, 51, 52, 53])
def test_contexts_end_at_both_ends(level):
    """Those of the levels from which a token's scale may or may not lead beyond them."""
    gains = torch.tensor([[-12, -11, 0, 11, 12]], dtype=torch.int8)
    sizes = Sizes(np.array([level], dtype=np.uint8), gains, np.zeros(1, dtype=int))
    contexts = np.clip(level + gains.numpy().astype(int), 0, CONTEXTS - 1)
    np.testing.assert_array_equal(sizes.contexts().numpy(), contexts)
    np.testing.assert_array_equal(sizes.zeros(slice(None)).numpy(), contexts * WIDTH + CAP)


def test_the_kernels_of_a_gpu_round_and_count_alike(rng, monkeypatch):
    kernels = pytest.importorskip("spectral_kv.at_rest.rounding_kernels", reason="needs Triton")
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(kernels, "TILES", 2)
    own = components([(rng.laplace(size=(300, 6)) * np.geomspace(300, 0.02, 6)).astype(np.float32)] * 2)
    wanted = own.rounded(0.5)
    monkeypatch.setattr(rounding, "on_gpu", lambda x: True)
    other = Components(own.values.to(DEVICE), own.block)
    logarithms, gains, largest = own._sizes
    other._sizes = logarithms, gains.to(DEVICE), largest
    found = other.rounded(0.5)
    np.testing.assert_array_equal(found.rounding.bounds, wanted.rounding.bounds)
    assert (Rounding().bounds != wanted.rounding.bounds).any()
    assert torch.equal(found.rows.cpu(), wanted.rows)
    np.testing.assert_array_equal(found.frequencies, wanted.frequencies)
    assert wanted.frequencies[:, CAP].sum() > 50 and (wanted.sizes.levels == 0).any()
    np.testing.assert_allclose(found.means.astype(int), wanted.means, atol=1)
    error = found.distortion(other.values, 0.5)
    monkeypatch.undo()
    assert error == pytest.approx(wanted.distortion(own.values, 0.5), rel=1e-4)


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
    with pytest.raises(ValueError, match="not finite"):
        components([np.full((50, 2), 1.5e19, dtype=np.float32)]).rounded(1e14)  # the sum of squares is not


def test_sizes_of_tokens_save_bits(blocks, rng):
    rounded = components(blocks).rounded(0.5)
    shuffled = components([rng.permuted(y, axis=0) for y in blocks]).rounded(0.5)
    assert rounded.bits < 0.97 * shuffled.bits


def test_numbers_give_way_where_they_cost_more_than_they_are_worth(blocks):
    own = components(blocks)
    rounded = own.rounded(1.0)
    there, levels = own.values[rounded.sizes.there], rounded.sizes.levels[rounded.sizes.there]
    plain = there.round().clamp(-CAP, CAP)
    contexts = rounded.sizes.contexts().to(torch.int16)
    rows = torch.cat([rounded.rows[:2], contexts * WIDTH + CAP + plain.to(torch.int16)])
    met = folded(counts(rows, (CONTEXTS + 1) * WIDTH).reshape(-1, WIDTH))
    nearest = replace(rounded, rows=rows, frequencies=met)
    vars(nearest)["means"] = means(there.abs(), plain.abs(), levels)
    cost = [r.distortion(own.values, 1.0) + 0.1155 * r.bits / 3000 for r in (rounded, nearest)]
    assert cost[0] < 0.99 * cost[1]
    assert rounded.bits < nearest.bits
    assert (Rounding().least > 0.5).all()


def test_numbers_stand_for_the_mean_of_what_was_rounded_to_them(blocks):
    own = components(blocks)
    rounded = own.rounded(1.0)
    bare = replace(rounded)
    vars(bare)["means"] = np.full((2, 64), 120, dtype=np.uint8)  # as they are
    assert rounded.distortion(own.values, 1.0) < 0.999 * bare.distortion(own.values, 1.0)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_kernels_find_the_same_sizes(blocks, monkeypatch):
    pytest.importorskip("spectral_kv.at_rest.rounding_kernels", reason="needs Triton")
    blocks = [y[:300, ::4].copy() for y in blocks]
    blocks[0][:, 5] = 0
    wanted = components(blocks)._sizes
    monkeypatch.setattr(rounding, "on_gpu", lambda x: True)
    own = components(blocks)
    own.values = own.values.to(DEVICE)
    found = own._sizes
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)
    assert (found[1].cpu() == wanted[1]).float().mean() > 0.999
    np.testing.assert_array_equal(found[2], wanted[2])
    for bad in (float("nan"), 1e20):
        few = torch.ones((2, 64), device=DEVICE).index_fill(1, torch.tensor([7], device=DEVICE), bad)
        with pytest.raises(ValueError, match="not finite"):
            Components(few, np.zeros(2, dtype=int)).levels(1e14)


def test_kernels_and_tables_say_what_numbers_stand_for(rng, monkeypatch):
    """Those in 16 bits are looked up, all others calculated; what is not there is zero."""
    pytest.importorskip("spectral_kv.at_rest.rounding_kernels", reason="needs Triton")
    numbers = torch.from_numpy(np.rint(rng.laplace(size=(9, 300)) * np.geomspace(90, 0.5, 9)[:, None]).clip(-CAP, CAP))
    levels = np.array([9, 0, 60, 8, 7, 40, 30, 0, 1, 63, 20], dtype=np.uint8)
    sizes = Sizes(levels, torch.zeros((1, 300), dtype=torch.int8), np.zeros(11, dtype=int))
    beyond = rng.integers(60, 180, (2, CONTEXTS)).astype(np.uint8)
    own = levels[sizes.there]
    wanted = values(numbers.to(torch.int32), own, beyond, 0.3)
    assert (wanted / 0.3 - numbers).abs().max() > 0.1
    assert torch.equal(values(numbers.to(torch.int16), own, beyond, 0.3), wanted)
    for kernel in (False, True):
        monkeypatch.setattr(rounding, "on_gpu", lambda x, kernel=kernel: kernel)
        where = DEVICE if kernel else "cpu"
        found = stand_for(numbers.to(torch.int16).to(where)[:, 3:], sizes, beyond, 0.3).cpu()
        assert torch.equal(found[sizes.there], wanted[:, 3:])
        assert not found[levels == 0].any()
