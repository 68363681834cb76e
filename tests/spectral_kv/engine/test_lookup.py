"""The PTX blocks, run by an interpreter of the few instructions that they use."""

import re

import numpy as np
import pytest

from spectral_kv.engine.lookup import PAIRS, PARTS, ptx
from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import pack, unpack

WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """Byte permutation; selector bit 3 of a nibble would replicate the sign."""
    source = (b << 32) | a
    nibbles = [(selector >> (4 * i)) & 15 for i in range(4)]
    assert all(n < 8 for n in nibbles)
    return sum(((source >> (8 * n)) & 255) << (8 * i) for i, n in enumerate(nibbles))


OPERATIONS = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "not.b32": lambda a: ~a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "sub.u32": lambda a, b: a - b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
}


def run(block: str, registers: dict[str, int]) -> dict[str, int]:
    known = {**registers, "%ctaid.z": 0}
    for line in block.split("\n"):
        if not (match := re.fullmatch(r"(\w[\w.]*) (\$?\w+), (.*);", line)) or line.startswith(".reg"):
            continue
        name, target, arguments = match.groups()
        values = [known[a] if a in known else int(a, 0) for a in arguments.split(", ")]
        known[target] = OPERATIONS[name](*values) & WORD
    return known


def halves(*words: int) -> np.ndarray:
    return np.array(words, dtype="<u4").view(np.float16)


def word(values) -> int:
    return int(np.ascontiguousarray(values, dtype=np.uint8).view("<u4")[0])


@pytest.mark.parametrize("bits", [2, 4])
def test_a_block_gives_the_centroids_of_every_byte_in_order(bits):
    every = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(-1, 4)
    table = codebook(bits)[0].astype(np.float16)
    for part in range(PARTS[bits]):
        for four in every:
            out = run(ptx(bits, part), {"$2": word(four)})
            codes = unpack(four[:, None], bits)[:, part]
            np.testing.assert_array_equal(halves(out["$0"], out["$1"]), table[codes])


def test_3_bit_planes_meet_in_pairs(rng):
    """From packed rows to centroids, as the kernel goes: a low byte and its bits of the high plane."""
    dim = 64
    codes = rng.integers(0, 8, size=(50, dim)).astype(np.uint8)
    packed = pack(codes, 3)
    low, high = packed[:, : dim // 4], packed[:, dim // 4 :]
    w = np.arange(dim // 4)
    beside = high[:, w % (dim // 8)] >> (w // (dim // 8)).astype(np.uint8)
    table = codebook(3)[0].astype(np.float16)
    got = np.empty((50, 4, dim // 4), dtype=np.float16)
    for row in range(50):
        for first in range(0, dim // 4, 4):
            span = slice(first, first + 4)
            pairs = run(PAIRS, {"$2": word(low[row, span]), "$3": word(beside[row, span])})
            for part in range(4):
                out = run(ptx(3, part % 2), {"$2": pairs["$0" if part < 2 else "$1"]})
                got[row, part, span] = halves(out["$0"], out["$1"])
    np.testing.assert_array_equal(got.reshape(50, dim), table[codes])
