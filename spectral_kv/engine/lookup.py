"""Centroids of packed codes in float16, four at a time, as blocks of PTX that a Triton kernel inlines.

A block takes one register of four bytes and leaves the four centroids of one part of their codes, in two registers of
two float16 each. A code selects the high and the low byte of its centroid out of registers (`prmt`), which is exact
and takes 2 to 3 instructions a code; a table in memory would take a load a code.

The tables are xored with a special register that is zero: `ptxas` would otherwise make every constant anew at every
use.
"""

import numpy as np

from spectral_kv.quantization.codebook import codebook

PARTS = {2: 4, 3: 4, 4: 2}  # codes in a byte, and with 3 bits in a byte of the low plane


def _words(values: np.ndarray) -> list[int]:
    """Bytes as 32-bit words, the first byte lowest."""
    padded = np.zeros(-(-len(values) // 4) * 4, dtype=np.uint8)
    padded[: len(values)] = values
    return [int(word) for word in padded.view("<u4")]


def _table(centroids: np.ndarray) -> tuple[list[int], list[int]]:
    """High and low bytes of float16 centroids, in words of four."""
    halves = np.asarray(centroids, dtype=np.float16).view(np.uint16)
    return _words((halves >> 8).astype(np.uint8)), _words((halves & 255).astype(np.uint8))


def _block(name: list[int], low: list[int], selectors: list[str], signed: bool) -> str:
    """`selectors` leave in register `i` an index in each byte, and in `s`, where signed, 8 in bytes below zero."""
    words = {f"h{n}": word for n, word in enumerate(name)} | {f"l{n}": word for n, word in enumerate(low)}
    last = len(name) - 1
    lines = [f"xor.b32 {register}, z, 0x{word:08x};" for register, word in words.items()]
    return "\n".join(
        [
            "{",
            f".reg .b32 z, i, s, t, hb, lb, {', '.join(words)};",
            "mov.u32 z, %ctaid.z;",
            *lines,
            *selectors,
            "shr.u32 t, i, 4;",  # indices as four neighbouring nibbles
            "or.b32 i, i, t;",
            "prmt.b32 i, i, i, 0x4420;",
            f"prmt.b32 hb, h0, h{last}, i;",
            f"prmt.b32 lb, l0, l{last}, i;",
            *(["mad.lo.u32 hb, s, 16, hb;"] if signed else []),
            "prmt.b32 $0, lb, hb, 0x5140;",
            "prmt.b32 $1, lb, hb, 0x7362;",
            "}",
        ]
    )


def ptx(bits: int, part: int) -> str:
    """The block for one part of the codes: `$2` holds four bytes, `$0` and `$1` get two float16 each.

    With 2 and 4 bits the bytes are those of `quantization.packing`; with 3 bits they hold two codes, the two low bits
    of code `part` from bit `2 * part` and its high bit at `4 + 2 * part`.
    """
    if bits == 4:  # eight magnitudes and a sign
        shift = "mov.b32 t, $2;" if part == 0 else "shr.u32 t, $2, 4;"
        selectors = [
            shift,
            "not.b32 s, t;",
            "and.b32 s, s, 0x08080808;",
            "and.b32 i, t, 0x07070707;",
            "shr.u32 t, s, 3;",
            "sub.u32 t, s, t;",  # 7 where the centroid is negative: there the magnitudes run backwards
            "xor.b32 i, i, t;",
        ]
        return _block(*_table(codebook(4)[0][8:]), selectors, signed=True)
    if bits == 2:
        selectors = [f"shr.u32 t, $2, {2 * part};", "and.b32 i, t, 0x03030303;"]
        return _block(*_table(codebook(2)[0]), selectors, signed=False)
    selectors = [
        f"shr.u32 t, $2, {2 * part};",
        "and.b32 i, t, 0x03030303;",
        "shr.u32 t, t, 2;",
        "and.b32 t, t, 0x04040404;",
        "or.b32 i, i, t;",
    ]
    return _block(*_table(codebook(3)[0]), selectors, signed=False)


# The two planes of 3-bit codes as bytes of two codes each: `$2` the low plane, `$3` bits of the high plane.
PAIRS = "\n".join(
    [
        "{",
        ".reg .b32 t, u;",
        "and.b32 t, $2, 0x0f0f0f0f;",
        "shl.b32 u, $3, 4;",
        "and.b32 u, u, 0x50505050;",
        "or.b32 $0, t, u;",
        "shr.u32 t, $2, 4;",
        "and.b32 t, t, 0x0f0f0f0f;",
        "and.b32 u, $3, 0x50505050;",
        "or.b32 $1, t, u;",
        "}",
    ]
)
