"""Which component gets how many bits: reverse water-filling with the distortions of real quantisers.

A component of variance v in b bits is left with an error of v D(b), D(b) being the distortion of a Lloyd-Max
quantiser of unit variance. Every D has a smaller slope than the one before it, so that giving the next bit where it
takes away most is optimal.
"""

import numpy as np

from spectral_kv.quantization.codebook import CENTROIDS, distortion

BITS = max(CENTROIDS)
WIDTH = 8  # components that share their number of bits, so that codes fill whole bytes


def slopes() -> np.ndarray:
    """What bit 1, 2, ... `BITS` of a component of unit variance takes from its distortion, `[BITS]`, descending."""
    return -np.diff([distortion(bits) for bits in range(BITS + 1)])


def water_filling(variances: list[np.ndarray], bits: float, side: int) -> list[np.ndarray]:
    """Bits a component, for blocks of components that share a budget.

    Components get bits in eights that are neighbours by variance.

    Parameters
    ----------
    variances : list of np.ndarray, [components]
        Of the components of every block, descending, in one unit.
    bits : float
        Budget of a token: what all codes and what goes with them take together at most.
    side : int
        Bits that a block pays for every number of bits that occurs in it (its class's scale).

    Returns
    -------
    list of np.ndarray of int, [components]
        Descending; components that do not fill an eight get none.
    """
    blocks = [v[: len(v) // WIDTH * WIDTH].reshape(-1, WIDTH).sum(axis=1) for v in variances]
    owner = np.repeat(np.arange(len(blocks)), [len(b) * BITS for b in blocks])
    gain = np.concatenate([np.outer(b, slopes()).ravel() for b in blocks])
    order = np.argsort(-gain, kind="stable")
    given = [np.zeros(len(b), dtype=int) for b in blocks]
    place = np.concatenate([np.repeat(np.arange(len(b)), BITS) for b in blocks])
    classes = [np.zeros(BITS + 1, dtype=int) for _ in blocks]
    spent = 0
    for step in order:
        block, at = owner[step], place[step]
        old = given[block][at]
        counts = classes[block]
        opened = side * (counts[old + 1] == 0) - side * (old > 0 and counts[old] == 1)
        if spent + WIDTH + opened > bits:
            break
        given[block][at] += 1
        counts[old] -= old > 0
        counts[old + 1] += 1
        spent += WIDTH + opened
    return [
        np.concatenate([np.repeat(g, WIDTH), np.zeros(len(v) - len(g) * WIDTH, dtype=int)])
        for g, v in zip(given, variances, strict=True)
    ]
