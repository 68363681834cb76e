import numpy as np
import pytest
import torch

from spectral_kv import xp
from spectral_kv.codec import fixed_rate
from spectral_kv.codec.allocation import water_filling
from spectral_kv.codec.bases import Bases
from spectral_kv.codec.fixed_rate import CELLS, RANGE, FixedRate
from spectral_kv.codec.rates import rate
from spectral_kv.quantization.codebook import distortion
from spectral_kv.quantization.packing import pack


@pytest.fixture
def coder(block):
    bits = water_filling([block[0].variances], 160, side=8)[0]
    return FixedRate(block[0], bits), bits


def test_the_error_is_the_one_that_bits_were_given_for(block, coder):
    found, x = block
    error = ((x - coder[0].decode(coder[0].encode(x))) * found.weights) ** 2
    expected = sum(v * distortion(int(b)) for v, b in zip(found.variances, coder[1], strict=True))
    assert 0.6 * expected < error.sum(axis=1).mean() < 1.5 * expected


def test_more_bits_leave_less_error(block):
    found, x = block
    errors = []
    for bits in (60, 120, 180):
        coder = FixedRate(found, water_filling([found.variances], bits, side=8)[0])
        errors.append((((x - coder.decode(coder.encode(x))) * found.weights) ** 2).sum())
    assert errors[0] > 1.1 * errors[1] > 1.21 * errors[2]


def test_bytes_are_those_of_the_buffers(block, coder):
    codes = coder[0].encode(block[1])
    bits = coder[1]
    assert coder[0].token_bytes == bits.sum() // 8 + len(set(bits.tolist()) - {0})
    assert codes.nbytes == 600 * coder[0].token_bytes


@pytest.mark.parametrize("room", [20_000, 2**22])
def test_codes_are_those_of_the_definition_of_every_class(block, coder, room, monkeypatch):
    """To the byte, however many tokens are coded at a time, also where some are far beyond the codebooks."""
    monkeypatch.setattr(xp, "ROOM", room)
    x = torch.from_numpy(block[1]) * torch.logspace(-3, 3, 600)[:, None]
    x[7], x[8, :5] = torch.from_numpy(block[0].mean), 1e6
    y = (x - torch.from_numpy(coder[0].mean)) @ torch.from_numpy(coder[0].analysis)
    expected, gains = [], []
    for c in coder[0].classes:
        own = y[:, c.start : c.stop]
        gain = (8 * (own**2).mean(-1, keepdim=True).clip(1e-30).log2()).round().add(128).clip(0, 255)
        cell = ((own / 2.0 ** ((gain - 128) / 16) + RANGE) * CELLS).floor().clip(0, 2 * RANGE * CELLS - 1)
        expected.append(pack(fixed_rate.cells(c.bits)[cell.long().numpy()], c.bits))
        gains.append(gain.to(torch.uint8))
    codes = coder[0].encode(x)
    np.testing.assert_array_equal(codes.packed.numpy(), np.concatenate(expected, axis=-1))
    np.testing.assert_array_equal(codes.gains.numpy(), torch.cat(gains, dim=-1).numpy())


def test_a_token_has_the_same_codes_alone_and_among_others(block, coder):
    together, alone = coder[0].encode(block[1]), coder[0].encode(block[1][17:18])
    assert (together.packed[17:18] == alone.packed).mean() > 0.95  # sums are rounded in another order
    again = coder[0].encode(block[1][:300]).append(coder[0].encode(block[1][300:]))
    assert (again.packed == together.packed).mean() > 0.999


def test_scales_follow_tokens_far_from_the_calibration(block, coder):
    found, x = block
    far = found.mean + 30 * (x - found.mean)
    relative = ((coder[0].decode(coder[0].encode(far)) - far) ** 2).sum() / ((far - found.mean) ** 2).sum()
    near = ((coder[0].decode(coder[0].encode(x)) - x) ** 2).sum() / ((x - found.mean) ** 2).sum()
    assert relative < 1.1 * near


def test_every_class_follows_a_scale_of_its_own(block, coder):
    """Also where it alone is far from the calibration; a class of 1 bit, which says signs alone, would not notice."""
    found, x = block
    components = (x - found.mean) @ found.analysis

    def relative(y: np.ndarray) -> list[float]:
        far = found.mean + y @ found.synthesis
        error = (coder[0].decode(coder[0].encode(far)) - far) @ found.analysis
        return [(error[:, c.start : c.stop] ** 2).sum() / (y[:, c.start : c.stop] ** 2).sum() for c in coder[0].classes]

    near = relative(components)
    second = coder[0].classes[1]
    assert second.bits > 1
    components[:, second.start : second.stop] *= 30
    assert relative(components)[:2] == pytest.approx(near[:2], rel=0.1)


@pytest.mark.parametrize("framework", ["torch", "mlx"])
def test_parity_of_frameworks(block, coder, framework):
    x = block[1]
    if framework == "torch":
        other = pytest.importorskip("torch").from_numpy(x)
    else:
        other = pytest.importorskip("mlx.core").array(x)
    ours, theirs = coder[0].encode(x), coder[0].encode(other)
    assert (np.asarray(theirs.packed) == ours.packed).mean() > 0.999
    np.testing.assert_allclose(np.asarray(coder[0].decode(theirs)), coder[0].decode(ours), atol=0.3)


def test_a_rate_keeps_to_its_bytes_and_refuses_too_few(bases):
    assert 15 <= rate(bases, 20).token_bytes <= 20
    with pytest.raises(ValueError, match="layers 0 to 1"):
        rate(Bases(bases.blocks, 8, bases.metadata), 1)
