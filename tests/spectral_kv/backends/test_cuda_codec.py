"""The transform coder on a GPU beside the CPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from spectral_kv.at_rest.content import AtRest
from spectral_kv.at_rest.rounding import Components
from spectral_kv.at_rest.storage import SpectralAtRest
from spectral_kv.at_rest.variable_rate import VariableRate
from spectral_kv.storage.spectral import SpectralStorage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = (2, 2, 16)


@pytest.fixture(scope="module")
def prefills(backend):
    """Keys and values, the same on the CPU and on the GPU."""
    prefill = backend.prefill(np.random.default_rng(0).integers(2, 8000, size=900), 1)
    return [([x.to(d) for x in prefill.keys], [x.to(d) for x in prefill.values]) for d in ("cpu", "cuda")]


def test_codes_that_live_are_alike(backend, bases_path, prefills):
    storage, positions = SpectralStorage(bases_path, None, 3, recent=20), np.arange(900)
    stored = [
        storage.store_together([x[None] for x in k], [x[None] for x in v], positions, 900, backend.rope)
        for k, v in prefills
    ]
    ours, theirs = (s[0].group.codes for s in stored)
    assert (ours.packed == theirs.packed.cpu()).float().mean() > 0.999
    for a, b in zip(*stored, strict=True):
        for x, y in zip(a.load(), b.load(), strict=True):
            assert ((x - y.cpu()) ** 2).mean() < 1e-4 * (x**2).mean()


@pytest.mark.parametrize("step", [0.02, 0.5])  # with and without numbers beyond the tables
def test_the_same_components_become_the_same_bytes(step):
    rng = np.random.default_rng(0)
    values = torch.from_numpy((rng.laplace(size=(60, 3000)) * np.geomspace(30, 0.02, 60)[:, None]).astype(np.float32))
    block = np.repeat([0, 1], 30)
    ours, theirs = Components(values, block), Components(values.cuda(), block)
    logarithms, gains, largest = ours._sizes
    theirs._sizes = logarithms, gains.cuda(), largest  # sums, which each device rounds in its own order
    written = [VariableRate.of(components, step, 256) for components in (ours, theirs)]
    for name in ("levels", "words", "states", "far", "ends"):
        np.testing.assert_array_equal(*(getattr(x, name) for x in written))
    read = [written[0].decode(3000, block, 100, 2900, x) for x in (values, values.cuda())]
    assert torch.equal(read[0], read[1].cpu())


def test_bytes_at_rest_are_read_alike_on_both(backend, bases_path, prefills):
    """Whole numbers are, bit for bit; the products that follow are rounded in another order."""
    storage, positions = SpectralAtRest(bases_path, 8, recent=20), np.arange(900)
    sizes = []
    for keys, values in prefills:
        content = storage.encode(keys, values, positions, backend.rope).to_bytes()
        sizes.append(len(content))
        read = [
            storage.decode(AtRest.from_bytes(content), SHAPE, backend.rope, x) for x in (prefills[0][0][0], keys[0])
        ]
        for a, b in zip(*read, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y.cpu(), atol=1e-4, rtol=1e-4)
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
