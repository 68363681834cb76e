import numpy as np
import pytest


@pytest.fixture
def blocks(rng):
    """Components of two blocks, of falling size, in tokens of different sizes and with heavy tails."""
    return [
        (rng.laplace(size=(3000, n)) * np.geomspace(8, 0.02, n) * rng.lognormal(0, 0.7, (3000, 1))).astype(np.float32)
        for n in (96, 64)
    ]
