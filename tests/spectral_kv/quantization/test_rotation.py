import numpy as np
import pytest

from spectral_kv.quantization.rotation import ROTATIONS, hadamard
from spectral_kv.xp import like


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("dim", [64, 128])
def test_rotation_keeps_inner_products(kind, dim, rng):
    rotation = ROTATIONS[kind](dim, (0, 1))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(dim), atol=1e-5)
    q, k = rng.normal(size=(2, 50, dim)).astype(np.float32)
    np.testing.assert_allclose((q @ rotation.T) @ (k @ rotation.T).T, q @ k.T, atol=1e-4)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotation_has_the_same_bits_for_the_same_seed_on_every_kind_of_array(kind, make):
    rotation = ROTATIONS[kind](64, (0, 1))
    ROTATIONS[kind].cache_clear()
    again = ROTATIONS[kind](64, (0, 1))
    assert again is not rotation
    assert np.asarray(like(again, make(np.zeros(1)))).tobytes() == rotation.tobytes()
    assert np.abs(rotation - ROTATIONS[kind](64, (0, 2))).max() > 0.1


def test_haar_columns_have_no_preferred_direction():
    """Q alone, without the signs of R, is not Haar: its diagonal is never positive on average."""
    diagonals = np.array([np.diag(ROTATIONS["haar"](16, (seed,))) for seed in range(300)])
    assert np.abs(diagonals.mean(0)).max() < 4 * 0.25 / 300**0.5  # entries have a standard deviation of 1/4


def test_hadamard_spreads_a_single_channel_evenly():
    rotation = hadamard(64, (3,))
    np.testing.assert_array_equal(np.abs(rotation), np.full((64, 64), 1 / 8, dtype=np.float32))
    assert 10 < (rotation[0] < 0).sum() < 54  # random signs


@pytest.mark.parametrize("dim", [0, 80, 96])
def test_hadamard_refuses_what_is_no_power_of_two(dim):
    with pytest.raises(ValueError, match=f"power of two channels, not {dim}: choose rotation=haar"):
        hadamard(dim, (0,))
