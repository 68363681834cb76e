"""Lloyd-Max codebooks of N(0, 1), which rotated channels nearly follow."""

from functools import cache

import numpy as np
from scipy.stats import norm

# Positive half, solved to 1e-13
CENTROIDS = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
    5: (0.0658897, 0.1980518, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.0487833, 1.2118044, 1.3863403,
        1.5762281, 1.7872332, 2.0287284, 2.3177394, 2.6911196, 3.2607325),
    6: (0.0334095, 0.1002783, 0.1672969, 0.2345670, 0.3021928, 0.3702826, 0.4389497, 0.5083138, 0.5785030, 0.6496556,
        0.7219219, 0.7954677, 0.8704766, 0.9471549, 1.0257363, 1.1064882, 1.1897201, 1.2757945, 1.3651410, 1.4582764,
        1.5558312, 1.6585889, 1.7675419, 1.8839772, 2.0096110, 2.1468102, 2.2989812, 2.4713048, 2.6722738, 2.9174068,
        3.2404371, 3.7441013),
}  # fmt: skip


@cache
def codebook(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids `[2 ** bits]` for unit variance, ascending, and the thresholds between them."""
    positive = np.array(CENTROIDS[bits])
    centroids = np.concatenate([-positive[::-1], positive]).astype(np.float32)
    return centroids, (centroids[1:] + centroids[:-1]) / 2


@cache
def distortion(bits: int) -> float:
    """Mean squared error of a codebook on N(0, 1): 1 for 0 bits."""
    if bits == 0:
        return 1.0
    centroids, thresholds = codebook(bits)
    shares = np.diff(norm.cdf(np.concatenate([[-np.inf], thresholds, [np.inf]])))
    return float(1 - shares @ centroids.astype(np.float64) ** 2)  # centroids are the means of their cells
