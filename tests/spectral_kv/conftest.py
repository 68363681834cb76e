import numpy as np
import pytest

from spectral_kv.codec.bases import Bases, Moments


@pytest.fixture(scope="session")
def bases_path(backend, tmp_path_factory) -> str:
    """File of the bases of the random checkpoint, its two layers in one block."""
    from spectral_kv.backends.torch_bases import measure

    rng = np.random.default_rng(1)
    windows = [rng.integers(2, 8000, size=440) for _ in range(3)]
    file = tmp_path_factory.mktemp("bases") / "bases.safetensors"
    measure(backend, windows, prompt=400, group=2, following=40).save(file)
    return str(file)


def correlated(rng, tokens: int, columns: int, rank: int) -> np.ndarray:
    """Tokens whose columns are mixtures of a few sources of falling strength, and a little noise."""
    mixing = rng.normal(size=(rank, columns)) * 2.0 ** -np.arange(rank)[:, None]
    return (rng.normal(size=(tokens, rank)) @ mixing + 0.02 * rng.normal(size=(tokens, columns)) + 3).astype(np.float32)


@pytest.fixture
def block(rng):
    """Of two layers with two heads of 8 channels, 64 columns, and the tokens it was measured on."""
    x = correlated(rng, 600, 64, 12)
    moments = Moments((0, 1))
    for part in (slice(0, 100), slice(100, 600)):
        moments.add(x[part], np.ones_like(x[part]))
    return moments.block(8), x


@pytest.fixture
def bases(block):
    return Bases((block[0],), 8, {"model": "a" * 64})
