import numpy as np
import pytest
import torch

from spectral_kv import xp
from spectral_kv.codec.bases import Bases, Moments, by_head, centred, columns, groups
from spectral_kv.rope import Rope
from spectral_kv.xp import float32, like, to_numpy


def test_moments_do_not_depend_on_how_text_was_cut(block, rng):
    found, x = block
    at_once = Moments((0, 1))
    at_once.add(x, np.ones_like(x))
    whole = at_once.block(8)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.variances, whole.variances, rtol=1e-4, atol=1e-9)


def test_components_are_uncorrelated_and_have_the_stated_variances(block):
    found, x = block
    z = (x - found.mean) @ found.analysis
    covariance = np.cov(z.T, bias=True)
    np.testing.assert_allclose(np.diag(covariance), found.variances, rtol=0.02, atol=1e-5 * found.variances[0])
    off = covariance - np.diag(np.diag(covariance))
    assert np.abs(off).max() < 5e-3 * found.variances[0]


def test_all_components_restore_the_columns(block):
    found, x = block
    restored = (x - found.mean) @ found.analysis @ found.synthesis + found.mean
    np.testing.assert_allclose(restored, x, atol=0.02)


def test_pairs_of_keys_and_heads_of_values_share_their_sensitivity(rng):
    x, gradients = rng.normal(size=(2, 400, 32))  # one layer, two heads of 8
    gradients *= np.arange(1, 33)
    moments = Moments((0,))
    moments.add(x, gradients)
    squares = (gradients**2).mean(axis=0) / 2
    weights = moments.block(8).weights
    np.testing.assert_allclose(weights[1] ** 2, (squares[1] + squares[5]) / 2, rtol=1e-5)
    assert weights[1] == weights[5] and weights[0] != weights[1]
    np.testing.assert_allclose(weights[16:24] ** 2, squares[16:24].mean(), rtol=1e-5)


def test_sensitive_columns_come_first(rng):
    x = rng.normal(size=(2000, 32))
    gradients = rng.normal(size=(2000, 32))
    gradients[:, 24:] *= 10  # values of the second head
    moments = Moments((0,))
    moments.add(x, gradients)
    first = moments.block(8).basis[:, :8].astype(float)
    assert (first[24:] ** 2).sum() > 0.99 * 8


def test_columns_and_heads(rng):
    keys, values = ([rng.normal(size=(2, 5, 8)) for _ in range(2)] for _ in range(2))
    x = columns(keys, values)
    assert x.shape == (5, 64)
    np.testing.assert_array_equal(by_head(x[:, 16:32], 8), keys[1])
    np.testing.assert_array_equal(by_head(x[:, 48:], 8), values[1])


def test_groups_are_as_equal_as_can_be():
    assert groups(8, 5) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [len(g) for g in groups(30, 5)] == [5] * 6


def test_a_file_gives_the_bases_back_and_is_checked(bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    bases.save(path)
    assert Bases.load(path, (2, 2, 8), "a" * 64).digest == bases.digest
    with pytest.raises(ValueError, match="another model"):
        Bases.load(path, (2, 2, 8), "b" * 64)
    with pytest.raises(ValueError, match=r"\[2, 2, 8\], this model has \[3, 2, 8\]"):
        Bases.load(path, (3, 2, 8))
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Bases.load(path, (2, 2, 8))
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="does not hold bases"):
        Bases.load(path, (2, 2, 8))


def test_truncation_keeps_the_largest_variances(bases):
    half = bases.truncated(0.5)
    assert half.blocks[0].basis.shape == (64, 32)
    np.testing.assert_array_equal(half.blocks[0].variances, bases.blocks[0].variances[:32])
    assert half.nbytes < bases.nbytes
    assert bases.truncated(1e-6).blocks[0].basis.shape == (64, 8)


def test_damaged_layouts_are_refused_in_one_sentence(bases, tmp_path):
    path = tmp_path / "bases.safetensors"
    bases.save(path)
    whole = path.read_bytes()
    for old, new in (
        (b'"groups":"2"', b'"groups":"x"'),
        (b'"groups":"2"', b'"groups":" "'),
        (b'"dim":"8"', b'"dim":"0"'),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=r"bases.safetensors does not hold bases of caches \(.*: calibrate"):
            Bases.load(path, (2, 2, 8))


def test_channels_keep_their_columns_and_pairs_share_their_variance(bases):
    found = bases.channels()
    assert [block.layers for block in found.blocks] == [(0,), (1,)]
    whole = bases.blocks[0]
    energies = (whole.basis.astype(float) ** 2) @ whole.variances
    for block, at in zip(found.blocks, (np.r_[0:16, 32:48], np.r_[16:32, 48:64]), strict=True):
        assert ((block.basis == 0) | (block.basis == 1)).all() and (block.basis.sum(axis=0) == 1).all()
        by_channel = block.basis.astype(float) @ block.variances
        np.testing.assert_allclose(by_channel[0], (energies[at][0] + energies[at][4]) / 2, rtol=0.02)
        assert by_channel[0] == by_channel[4]
        np.testing.assert_allclose(by_channel[16:], energies[at][16:], rtol=0.02, atol=1e-3 * energies.max())
        assert (np.diff(block.variances) <= 0).all()
        assert block.nbytes == (2 + 3 * 4) * 32  # an order, and three numbers a channel


def test_groups_are_cut_where_the_bases_allow_it(bases):
    assert bases.regrouped(2).blocks[0] is bases.blocks[0]
    assert [block.layers for block in bases.regrouped(1).blocks] == [(0,), (1,)]
    with pytest.raises(ValueError, match="layers=2: these bases have groups of 1, 1 layers"):
        bases.regrouped(1).regrouped(2)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "numpy"])
def test_columns_less_their_mean_are_written_as_they_are_defined(rng, dtype, wide, monkeypatch):
    """To the bit, in one go or in parts, of two sequences and two layers; what was given stays as it is."""
    rope, positions = Rope(np.geomspace(1, 1e-2, 4)), np.arange(5, 25)
    keys, values = ([rng.normal(size=(2, 3, 20, 8)).astype(np.float32) for _ in range(2)] for _ in range(2))
    if dtype != "numpy":
        keys, values = ([torch.from_numpy(x).to(getattr(torch, dtype)) for x in kind] for kind in (keys, values))
    mean = rng.normal(size=96).astype(np.float32)
    monkeypatch.setattr(xp, "ROOM", 20_000 if wide else 2**22)
    copies = [x.copy() if dtype == "numpy" else x.clone() for x in keys]
    found = centred(keys, values, positions, rope, mean, wide)
    turned = [rope.unrotate(float32(k) if wide else k, positions) for k in keys]
    expected = float32(columns(turned, values)) - like(mean, keys[0])
    assert found.dtype == expected.dtype and found.shape == (2, 20, 96)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))
    assert all((x == y).all() for x, y in zip(keys, copies, strict=True))
