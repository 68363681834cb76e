"""Lookups of coded rows on a CPU."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_kv.engine import rows
from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import pack, unpack


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_lookup_gives_centroids_in_its_own_order(rng, bits):
    codes = pack(rng.integers(0, 2**bits, size=(2, 3, 50, 64)).astype(np.uint8), bits)
    lookup = rows.Lookup(bits, 64)
    want = codebook(bits)[0][unpack(codes, bits)][..., lookup.order]
    held = torch.from_numpy(np.pad(codes, [(0, 0), (0, 0), (0, 7), (0, 0)]))[:, :, :50]  # as a part of a buffer
    np.testing.assert_array_equal(lookup(held), want.astype(np.float32))


class Gathered(TorchDispatchMode):
    """Shapes of the indices that `gather` is called with."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.gather.default:
            self.shapes.append((args[1], tuple(args[2].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [2, 4])
def test_vectors_are_rows_that_cores_share(bits):
    """A `gather` shares rows among cores; along one axis alone it runs on one of them."""
    with Gathered() as gathered:
        rows.Lookup(bits, 64)(torch.zeros(2, 3, 50, 8 * bits, dtype=torch.uint8))
    assert gathered.shapes == [(1, (300, 16))]
