"""Attention of rotated queries over cached keys."""

from importlib.util import find_spec

import numpy as np

from spectral_kv.xp import Array, blocks, like, namespace, softmax, wide


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


def attention_output(queries: Array, keys: Array, values: Array, scaling: float, bias: Array | None = None) -> Array:
    """Output of every query head over a prefix that it sees whole, before W_O: `[query_heads, positions, dim]`.

    `values` is `[kv_heads, tokens, dim]`, `bias` `[kv_heads, tokens]` is added to the logits; the rest as in
    `attention_weights`.
    """
    xp = namespace(queries)
    logits = attention_logits(queries, keys, scaling)
    if bias is not None:
        shape = logits.shape
        logits = xp.reshape(xp.reshape(logits, (len(keys), -1, shape[-1])) + bias[:, None], shape)
    weights = softmax(logits)
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


def attention_received(queries: Array, keys: Array, scaling: float, causal: bool = True) -> Array:
    """Weight of every key summed over queries, `[kv_heads, tokens]`; the mean over the query heads of a KV head.

    Arguments as in `attention_weights`; the weights of all queries are never there at once, nor are the keys of all
    heads in single precision, where they would take more than the keys themselves.
    """
    if getattr(keys, "is_cuda", False) and find_spec("triton") is not None:
        from spectral_kv.engine import received

        if received.suits(queries, keys):
            return received.received(queries, keys, scaling, causal)
    xp = namespace(keys)
    (kv_heads, tokens, dim), (query_heads, count, _) = keys.shape, queries.shape
    group = query_heads // kv_heads
    weight_bytes = 12 * count * tokens  # of a query head: logits, their distance from the largest, exponentials
    found = []
    for heads in blocks(kv_heads, kv_heads * (group * weight_bytes + 4 * tokens * dim), keys):
        own, cached = queries[heads.start * group : heads.stop * group], wide(keys[heads])
        total = xp.zeros_like(cached[..., 0])
        for some in blocks(count, own.shape[0] * weight_bytes, keys):
            seen = tokens - count + some.stop if causal else tokens
            logits = attention_logits(own[:, some], cached[:, :seen], scaling, causal)
            # the weights summed over queries as one product: dividing all of them first would be most of the work
            exponentials = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
            shares = xp.reshape(1.0 / xp.sum(exponentials, axis=-1), (len(cached), 1, -1))
            mass = xp.matmul(shares, xp.reshape(exponentials, (len(cached), -1, seen)))[:, 0]
            total = total + xp.concat([mass, xp.zeros_like(total[:, seen:])], axis=-1)
        found.append(total / group)
    return xp.concat(found, axis=0)
