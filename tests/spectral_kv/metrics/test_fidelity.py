import numpy as np
import pytest
import torch

from spectral_kv.metrics.fidelity import cosine, interpolated, relative_error, spectral_distance


def mlx_array(x):
    return pytest.importorskip("mlx.core").array(x.astype(np.float32))


makers = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])


@makers
def test_kept_rows_stay_and_gaps_are_straight_lines(make, rng):
    x = rng.normal(size=(2, 6, 3))
    positions = np.array([[0, 3, 4, 9, 15, 19], [2, 3, 7, 8, 12, 16]])
    expected = np.zeros((2, 20, 3))
    for head in range(2):
        for token in range(20):
            before = max((i for i in range(6) if positions[head, i] <= token), default=0)
            after = min((i for i in range(6) if positions[head, i] >= token), default=5)
            span = positions[head, after] - positions[head, before]
            share = 0 if span <= 0 else (token - positions[head, before]) / span
            expected[head, token] = (1 - share) * x[head, before] + share * x[head, after]
    found = np.asarray(interpolated(make(x), positions, 20))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for head in range(2):
        np.testing.assert_array_equal(found[head, positions[head]], np.asarray(make(x))[head])


def test_errors_equal_loops(rng):
    full, other = rng.normal(size=(2, 3, 40, 5))
    error = [np.sqrt(((o - f) ** 2).sum() / (f**2).sum()) for o, f in zip(other, full, strict=True)]
    np.testing.assert_allclose(relative_error(other, full), error, rtol=1e-12)
    angle = [
        np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(o, f, strict=True)])
        for o, f in zip(other, full, strict=True)
    ]
    np.testing.assert_allclose(cosine(other, full), angle, rtol=1e-12)


def test_spectral_distance_equals_a_slow_transform(rng):
    full, other = rng.normal(size=(2, 2, 31, 4))

    def share(x):
        x = x - x.mean(axis=0)
        waves = np.exp(-2j * np.pi * np.outer(np.arange(16), np.arange(31)) / 31)
        power = (np.abs(waves @ x) ** 2).sum(axis=1)
        return power / power.sum()

    expected = [0.5 * np.abs(share(o) - share(f)).sum() for o, f in zip(other, full, strict=True)]
    np.testing.assert_allclose(spectral_distance(other, full), expected, rtol=1e-9)


@makers
def test_anchors(make, rng):
    full = make(rng.normal(size=(2, 64, 4)))
    assert np.asarray(relative_error(full, full)).max() == np.asarray(spectral_distance(full, full)).max() == 0
    np.testing.assert_allclose(np.asarray(relative_error(0 * full, full)), 1, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(cosine(-2 * full, full)), -1, rtol=1e-6)
    time = np.arange(64)[None, :, None] * 2 * np.pi / 64
    slow, fast = make(np.cos(3 * time) * np.ones((1, 1, 2))), make(np.sin(20 * time) * np.ones((1, 1, 2)))
    np.testing.assert_allclose(np.asarray(spectral_distance(slow, fast)), 1, atol=1e-5)
