import numpy as np
import pytest


@pytest.fixture(scope="session")
def bases_path(backend, tmp_path_factory) -> str:
    """File of the bases of the random checkpoint, its two layers in one block."""
    from spectral_kv.backends.torch_bases import measure

    rng = np.random.default_rng(1)
    windows = [rng.integers(2, 8000, size=440) for _ in range(3)]
    file = tmp_path_factory.mktemp("bases") / "bases.safetensors"
    measure(backend, windows, prompt=400, group=2, following=40).save(file)
    return str(file)
