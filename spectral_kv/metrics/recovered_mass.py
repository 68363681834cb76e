"""How much of the full cache's attention falls on tokens that were kept."""

from spectral_kv.xp import Array, namespace


def recovered_mass(kept: Array, full: Array) -> Array:
    """Share of the full cache's attention that falls on the kept tokens.

    Parameters
    ----------
    kept, full : array, [query_heads, positions]
        `attention_log_mass` over the kept keys as the full cache holds them, and over all of its keys.

    Returns
    -------
    array, [query_heads, positions]
        1 where everything that is looked at was kept.
    """
    return namespace(full).exp(kept - full)
