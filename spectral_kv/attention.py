"""Attention of rotated queries over cached keys."""

import numpy as np

from spectral_kv.xp import Array, float32, like, namespace, softmax, wide

CHUNK = 128  # queries at a time: weights of all take tokens^2 numbers a head, those of few fit into a CPU's cache


def attention_logits(queries: Array, keys: Array, scaling: float, causal: bool = False) -> Array:
    """Scaled products `[query_heads, positions, tokens]` of queries and keys as in `attention_weights`.

    -inf where a query does not see a key.
    """
    xp = namespace(queries)
    kv_heads, tokens, dim = keys.shape
    heads, positions, _ = queries.shape
    grouped = xp.reshape(wide(queries) * scaling, (kv_heads, heads // kv_heads * positions, dim))
    logits = xp.reshape(xp.matmul(grouped, xp.permute_dims(wide(keys), (0, 2, 1))), (heads, positions, tokens))
    if causal:
        own = like(np.arange(tokens - positions, tokens), logits)[:, None]
        logits = xp.where(like(np.arange(tokens), logits) > own, -np.inf, logits)
    return logits


def attention_weights(queries: Array, keys: Array, scaling: float, causal: bool = False) -> Array:
    """Weights of every query over the keys.

    Parameters
    ----------
    queries : array, [query_heads, positions, dim]
        Rotated.
    keys : array, [kv_heads, tokens, dim]
        Rotated; query head h reads KV head `h // (query_heads / kv_heads)`.
    scaling : float
        Factor on the logits, usually `dim ** -0.5`.
    causal : bool
        The queries are those of the last tokens and do not see what follows them. Otherwise they see every key.

    Returns
    -------
    array, [query_heads, positions, tokens]
        In single precision, or double where the arguments are.
    """
    return softmax(attention_logits(queries, keys, scaling, causal))


def attention_output(queries: Array, keys: Array, values: Array, scaling: float) -> Array:
    """Output of every query head over a prefix that it sees whole, before W_O: `[query_heads, positions, dim]`.

    `values` is `[kv_heads, tokens, dim]`; the rest as in `attention_weights`.
    """
    xp = namespace(queries)
    weights = attention_weights(queries, keys, scaling)
    kv_heads, tokens, dim = values.shape
    heads, positions, _ = weights.shape
    grouped = xp.reshape(weights, (kv_heads, heads // kv_heads * positions, tokens))
    return xp.reshape(xp.matmul(grouped, wide(values)), (heads, positions, dim))


def attention_log_mass(queries: Array, keys: Array, scaling: float) -> Array:
    """Logarithm of the softmax's denominator over keys that every query sees, `[query_heads, positions]`.

    Its difference between a subset of the keys and all of them is the logarithm of the weight of the subset.
    """
    xp = namespace(queries)
    logits = attention_logits(queries, keys, scaling)
    largest = xp.max(logits, axis=-1, keepdims=True)
    return (xp.log(xp.sum(xp.exp(logits - largest), axis=-1, keepdims=True)) + largest)[..., 0]


def attention_mass(weights: Array, kv_heads: int) -> Array:
    """Mean weight `[kv_heads, tokens]` over positions and the query heads that share a KV head.

    `weights` is `[query_heads, positions, tokens]`.
    """
    xp = namespace(weights)
    return xp.mean(xp.reshape(weights, (kv_heads, -1, weights.shape[-1])), axis=1)


def attention_received(queries: Array, keys: Array, scaling: float) -> Array:
    """Weight of every key summed over the queries of the last tokens, `[kv_heads, tokens]`.

    Every query sees what came before it; the mean is over the query heads that share a KV head. Arguments as in
    `attention_weights`; the weights of all queries are never there at once.
    """
    xp = namespace(keys)
    (kv_heads, tokens, _), (query_heads, count, _) = keys.shape, queries.shape
    total: Array = 0.0
    for start in range(0, count, CHUNK):
        part = queries[:, start : start + CHUNK]
        seen = tokens - count + start + part.shape[1]
        logits = attention_logits(part, keys[:, :seen], scaling, causal=True)
        # the weights summed over queries as one product: dividing all of them first would be most of the work
        exponentials = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        shares = xp.reshape(1.0 / xp.sum(exponentials, axis=-1), (kv_heads, 1, -1))
        mass = xp.matmul(shares, xp.reshape(exponentials, (kv_heads, -1, seen)))[:, 0]
        unseen = xp.zeros_like(float32(keys[:, seen:, 0]))
        total = total + xp.concat([mass, unseen], axis=-1)
    return total / (query_heads // kv_heads)
