"""How much of the full cache's attention falls on tokens that were kept."""

import numpy as np

from spectral_kv.xp import Array, like, namespace, to_numpy


def recovered_mass(weights: Array, kept: Array) -> Array:
    """Sum of full-cache weights over the kept tokens.

    Parameters
    ----------
    weights : array, [query_heads, positions, tokens]
        Of the full cache.
    kept : array of int, [kv_heads, kept]
        Kept tokens of every KV head.

    Returns
    -------
    array, [query_heads, positions]
        1 where everything that is looked at was kept.
    """
    xp = namespace(weights)
    heads, positions, tokens = weights.shape
    chosen = to_numpy(kept)
    mask = np.zeros((chosen.shape[0], tokens, 1), dtype=np.float32)
    np.put_along_axis(mask, chosen[..., None], 1.0, axis=1)
    grouped = xp.reshape(weights, (chosen.shape[0], -1, tokens))
    return xp.reshape(xp.matmul(grouped, like(mask, weights)), (heads, positions))
