"""Layers whose KV heads hold different numbers of tokens: a list of arrays, one a head, in the place of one array."""

from collections.abc import Callable, Iterator

from spectral_kv.xp import Array, namespace, rows

Heads = Array | list[Array]  # [kv_heads, tokens, ...], or one [tokens, ...] a head


def runs(*layers: Heads) -> Iterator[tuple[slice, list[Array]]]:
    """KV heads that hold equally many tokens, and of every argument `[heads of the run, tokens, ...]`.

    All heads at once where the arguments are arrays, else one after the other.
    """
    if not isinstance(layers[0], list):
        yield slice(0, len(layers[0])), list(layers)
        return
    for head in range(len(layers[0])):
        yield slice(head, head + 1), [x[head][None] for x in layers]


def taken(x: Array, chosen: Heads) -> Heads:
    """Tokens `chosen` of `[kv_heads, tokens, dim]`, every head its own, in the form of `chosen`."""
    if not isinstance(chosen, list):
        return rows(x, chosen)
    return [rows(x[head : head + 1], own[None])[0] for head, own in enumerate(chosen)]


def of_queries(queries: Array, heads: slice, kv_heads: int) -> Array:
    """Those of `[query_heads, ...]` that read the KV heads `heads` of `kv_heads`."""
    group = len(queries) // kv_heads
    return queries[heads.start * group : heads.stop * group]


def by_run(function: Callable[..., Array], queries: Array, *layers: Heads) -> Array:
    """`function(queries, *arrays)` of every run of KV heads, joined along its first axis, the query heads."""
    found = [function(of_queries(queries, heads, len(layers[0])), *own) for heads, own in runs(*layers)]
    return found[0] if len(found) == 1 else namespace(queries).concat(found, axis=0)


def uneven(layers: list[Heads]) -> bool:
    """Whether layers, or the KV heads of one, hold different numbers of tokens or may do so."""
    return any(isinstance(x, list) or x.shape != layers[0].shape for x in layers)


def held(layer: Heads) -> int:
    """Tokens of a layer over its KV heads, of indices `[kv_heads, kept]` or a list."""
    return sum(len(head) for head in layer)
