import numpy as np
import pytest

from spectral_kv.quantization.packing import pack, unpack


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_round_trip_in_exactly_the_bytes_of_the_codes(make, bits, dim, rng):
    codes = rng.integers(0, 2**bits, size=(3, 50, dim)).astype(np.uint8)
    packed = pack(make(codes), bits)
    assert packed.shape == (3, 50, dim * bits // 8)
    assert packed.nbytes == 3 * 50 * dim * bits // 8
    np.testing.assert_array_equal(np.asarray(unpack(packed, bits)), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_code_in_every_place(bits, dim, rng):
    codes = rng.integers(0, 2**bits, size=(dim, 2**bits, dim)).astype(np.uint8)
    codes[np.arange(dim), :, np.arange(dim)] = np.arange(2**bits)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize(
    "bits, code, layout",
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x51, 0x62, 0x73, 0x84]),
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
        (1, [1, 0, 0, 0, 1, 1, 0, 1], [0b1011_0001]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b1111_0000]),
    ],
)
def test_layout_of_the_bytes(bits, code, layout):
    np.testing.assert_array_equal(pack(np.array([code], dtype=np.uint8), bits), [layout])


@pytest.mark.parametrize("bits, dim", [(7, 64), (0, 64), (4, 12)])
def test_refuses_what_does_not_fill_bytes(bits, dim):
    with pytest.raises(ValueError, match="1 to 6 bits"):
        pack(np.zeros((2, dim), dtype=np.uint8), bits)
