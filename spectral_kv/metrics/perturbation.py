"""How far compression moves the output of attention."""

from spectral_kv.xp import Array, namespace


def attention_output_perturbation(kept: Array, full: Array) -> Array:
    """AOP `||o_kept - o_full|| / ||o_full||` of outputs `[query_heads, positions, dim]`, as `[query_heads, positions]`.

    0 for an unchanged output, 1 for a zero vector in its place.
    """
    xp = namespace(full)
    difference = xp.sqrt(xp.sum((kept - full) ** 2, axis=-1))
    return difference / xp.sqrt(xp.sum(full**2, axis=-1))
