"""Codes of 1 to 6 bits in whole bytes, `dim * bits / 8` bytes a vector.

Layouts keep related codes apart by a fixed stride, so that unpacking is a shift and a concatenation: 4 bits in two
halves (code i and code i + dim/2 share a byte), 2 bits in four quarters, 1 bit in eight eighths; other codes are a
plane of their low bits and a plane of their high bits.
"""

from spectral_kv.xp import Array, namespace

LOW = {3: 2, 5: 4, 6: 4}  # bits of the low plane of codes that take two


def _pack_plane(codes: Array, bits: int) -> Array:
    shift = 4  # of the parts in the second half; of what is left then, half as much
    while shift >= bits:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | codes[..., half:] << shift
        shift //= 2
    return codes


def _unpack_plane(packed: Array, bits: int) -> Array:
    xp = namespace(packed)
    mask = xp.full_like(packed, 2**bits - 1)
    shifted = [xp.bitwise_right_shift(packed, xp.full_like(packed, part * bits)) & mask for part in range(8 // bits)]
    return xp.concat(shifted, axis=-1)


def pack(codes: Array, bits: int) -> Array:
    """Codes `[..., dim]` (uint8, each below `2 ** bits`) as bytes `[..., dim * bits / 8]`.

    Raises
    ------
    ValueError
        If `bits` is not 1 to 6, or `dim` is not a multiple of 8.
    """
    if bits not in (1, 2, 3, 4, 5, 6) or codes.shape[-1] % 8:
        raise ValueError(
            f"packing takes 1 to 6 bits and a multiple of 8 channels, not {bits} bits and {codes.shape[-1]} channels"
        )
    if bits not in LOW:
        return _pack_plane(codes, bits)
    xp, split = namespace(codes), LOW[bits]
    return xp.concat([_pack_plane(codes & 2**split - 1, split), _pack_plane(codes >> split, bits - split)], axis=-1)


def planes(packed: Array) -> tuple[Array, Array]:
    """The low 2 bits `[..., dim / 4]` and the high bits `[..., dim / 8]` of packed 3-bit codes."""
    split = packed.shape[-1] * 2 // 3
    return packed[..., :split], packed[..., split:]


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`: bytes `[..., dim * bits / 8]` as codes `[..., dim]`."""
    if bits not in LOW:
        return _unpack_plane(packed, bits)
    xp, split = namespace(packed), LOW[bits]
    width = packed.shape[-1] * split // bits
    low, high = _unpack_plane(packed[..., :width], split), _unpack_plane(packed[..., width:], bits - split)
    return low | xp.bitwise_left_shift(high, xp.full_like(high, split))
