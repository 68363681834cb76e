"""Milliseconds to decode packed codes: by a table over bytes, and by shifts and masks, in turns.

python benchmarks/codes.py
python benchmarks/codes.py 3964 --dim 128 --heads 8 --arrays numpy
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch

from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import unpack
from spectral_kv.quantization.rotation import ROTATIONS
from spectral_kv.quantization.turboquant import PackedVectors, TurboQuant
from spectral_kv.xp import Array, constant, float32, namespace

SEED = (0, 0, 0)


def by_shifts(packed: PackedVectors, bits: int) -> Array:
    """What `TurboQuant.decode` gives, code by code."""
    xp = namespace(packed.codes)
    codes = unpack(packed.codes, bits)
    index = xp.reshape(xp.astype(codes, xp.int64), (-1,))
    centroids = xp.reshape(xp.take(constant(codebook(bits)[0], codes), index, axis=0), codes.shape)
    rotation = constant(ROTATIONS["haar"](codes.shape[-1], SEED), centroids)
    return xp.matmul(centroids * float32(packed.scale)[..., None], rotation) + float32(packed.mean)


def measured(tokens: int, heads: int, dim: int, arrays: str, repeats: int) -> pd.DataFrame:
    """One row a width: medians, their ratio, and the largest difference."""
    vectors = np.random.default_rng(0).normal(size=(heads, tokens, dim)).astype(np.float32)
    x = torch.from_numpy(vectors) if arrays == "torch" else vectors
    rows = []
    for bits in (4, 3, 2):
        quantizer = TurboQuant(bits, SEED, "renorm", center=True)
        packed = quantizer.encode(x)
        ways = (lambda p=packed, b=bits: by_shifts(p, b), lambda p=packed, q=quantizer: q.decode(p))
        difference = float(abs(ways[0]() - ways[1]()).max())
        seconds = []
        for _ in range(repeats):
            start = [time.perf_counter()]
            for way in ways:
                way()
                start.append(time.perf_counter())
            seconds.append(np.diff(start))
        shifts, table = 1e3 * np.median(seconds, axis=0)
        rows.append((bits, shifts, table, shifts / table, difference))
    return pd.DataFrame(rows, columns=["bits", "shifts, ms", "table, ms", "times as fast", "largest difference"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="?", type=int, default=3964)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--arrays", choices=("torch", "numpy"), default="torch")
    parser.add_argument("--repeats", type=int, default=51)
    options = vars(parser.parse_args())
    print(measured(**options).to_markdown(index=False, floatfmt=("", ".2f", ".2f", ".1f", ".0e")))
