"""Lloyd-Max codebooks of N(0, 1), which rotated channels nearly follow."""

from functools import cache

import numpy as np

# Positive half, solved to 1e-13
CENTROIDS = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}


@cache
def codebook(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids `[2 ** bits]` for unit variance, ascending, and the thresholds between them."""
    positive = np.array(CENTROIDS[bits])
    centroids = np.concatenate([-positive[::-1], positive]).astype(np.float32)
    return centroids, (centroids[1:] + centroids[:-1]) / 2
