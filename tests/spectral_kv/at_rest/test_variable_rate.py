import numpy as np
import pytest
import torch

from spectral_kv.at_rest.rounding import Components, values
from spectral_kv.at_rest.variable_rate import VariableRate
from tests.spectral_kv.at_rest.joined import components


def read(written: VariableRate, of: Components, start: int, stop: int) -> torch.Tensor:
    return written.decode(of.tokens, of.block, start, stop, of.values)


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


def test_words_do_not_depend_on_how_many_components_are_looked_at_at_a_time(blocks, monkeypatch):
    written = []
    for numbers in (2**17, 3000):
        monkeypatch.setattr("spectral_kv.at_rest.counting.PART", numbers)
        written.append(VariableRate.of(components(blocks), 0.5, 256))
    for name in ("levels", "means", "words", "states", "far", "ends"):
        np.testing.assert_array_equal(*(getattr(w, name) for w in written))


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


def test_components_that_are_nothing_take_nothing(blocks):
    with_nothing = [np.concatenate([y, 1e-3 * y], axis=1) for y in blocks]
    less, more = (VariableRate.of(components(y), 2.0, 3000) for y in (blocks, with_nothing))
    assert (more.levels == 0).sum() >= 160
    assert more.words.nbytes < 1.02 * less.words.nbytes
