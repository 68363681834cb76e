"""Attention output over a cached prefix, and how far compression moves it."""

from spectral_kv.xp import Array, float32, namespace, softmax


def attention_weights(queries: Array, keys: Array, scaling: float) -> Array:
    """Weights of every query over a prefix that it sees whole.

    Parameters
    ----------
    queries : array, [query_heads, positions, dim]
        Rotated.
    keys : array, [kv_heads, tokens, dim]
        Rotated; query head h reads KV head `h // (query_heads / kv_heads)`.
    scaling : float
        Factor on the logits, usually `dim ** -0.5`.

    Returns
    -------
    array, float32 [query_heads, positions, tokens]
    """
    xp = namespace(queries)
    kv_heads, tokens, dim = keys.shape
    heads, positions, _ = queries.shape
    grouped = xp.reshape(float32(queries), (kv_heads, heads // kv_heads * positions, dim))
    weights = softmax(xp.matmul(grouped, xp.permute_dims(float32(keys), (0, 2, 1))) * scaling)
    return xp.reshape(weights, (heads, positions, tokens))


def attention_output(queries: Array, keys: Array, values: Array, scaling: float) -> Array:
    """Output of every query head over the prefix, before W_O: float32 `[query_heads, positions, dim]`.

    `values` is `[kv_heads, tokens, dim]`; the rest as in `attention_weights`.
    """
    xp = namespace(queries)
    weights = attention_weights(queries, keys, scaling)
    kv_heads, tokens, dim = values.shape
    heads, positions, _ = weights.shape
    grouped = xp.reshape(weights, (kv_heads, heads // kv_heads * positions, tokens))
    return xp.reshape(xp.matmul(grouped, float32(values)), (heads, positions, dim))


def attention_output_perturbation(kept: Array, full: Array) -> Array:
    """AOP `||o_kept - o_full|| / ||o_full||` of outputs `[query_heads, positions, dim]`, as `[query_heads, positions]`.

    0 for an unchanged output, 1 for a zero vector in its place.
    """
    xp = namespace(full)
    difference = xp.sqrt(xp.sum((kept - full) ** 2, axis=-1))
    return difference / xp.sqrt(xp.sum(full**2, axis=-1))
