import numpy as np
import pytest
import torch

from spectral_kv.quantization.packing import pack, unpack


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_round_trip_in_exactly_the_bytes_of_the_codes(make, bits, dim, rng):
    codes = rng.integers(0, 2**bits, size=(3, 50, dim)).astype(np.uint8)
    packed = pack(make(codes), bits)
    assert packed.nbytes == 3 * 50 * dim * bits // 8
    np.testing.assert_array_equal(np.asarray(unpack(packed, bits)), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_in_every_place(bits):
    codes = np.stack([np.roll(np.arange(8), shift) % 2**bits for shift in range(8)]).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits, dim", [(5, 64), (1, 64), (4, 12)])
def test_refuses_what_does_not_fill_bytes(bits, dim):
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        pack(np.zeros((2, dim), dtype=np.uint8), bits)
