"""The few array functions that `array_api_compat` lacks or that differ between NumPy, torch and MLX.

Everything outside `backends/` computes through the namespace that `namespace(x)` returns, so that one source runs
on every kind of array. Index vectors and filters are built with NumPy and brought over by `like`.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

Array = Any  # a NumPy, torch or MLX array

__all__ = [
    "Array",
    "blocks",
    "constant",
    "float32",
    "largest",
    "lengths",
    "like",
    "namespace",
    "on_accelerator",
    "over_tokens",
    "picked",
    "rows",
    "softmax",
    "stable_order",
    "to_numpy",
    "turned",
    "weighted_sums",
    "wide",
]


_namespaces: dict[type, Any] = {}


def namespace(x: Array) -> Any:
    """The array functions of the kind of `x`; to find out takes as long as a small one of them, so once a type."""
    found = _namespaces.get(type(x))
    if found is None:
        found = _namespaces[type(x)] = array_namespace(x)
    return found


def like(values: np.ndarray, x: Array) -> Array:
    """A NumPy array as an array of the kind, and on the device, of `x` (the dtype of `values` is kept)."""
    xp = namespace(x)
    device = getattr(x, "device", None)
    return xp.asarray(values) if device is None else xp.asarray(values, device=device)


CONSTANTS_MB = 256  # of constants that stay on devices

_constants: OrderedDict[tuple, tuple[np.ndarray, Array]] = OrderedDict()


def constant(values: np.ndarray, x: Array) -> Array:
    """`like`, for an array that its maker keeps and nobody changes: it is brought to a device once.

    Tables of indices, filters and rotations are the same for all layers, and bringing them over again for each would
    take longer on a GPU than what is done with them.
    """
    key = (id(values), namespace(x).__name__, str(getattr(x, "device", None)))
    if key not in _constants:
        _constants[key] = values, like(values, x)  # with `values` alive, its id stays its own
        while len(_constants) > 1 and sum(kept.nbytes for kept, _ in _constants.values()) > CONSTANTS_MB * 1e6:
            _constants.popitem(last=False)
    _constants.move_to_end(key)
    return _constants[key][1]


def on_accelerator(x: Array) -> bool:
    """Whether an array lies on a device that a host feeds, to which a few large steps cost less than many small."""
    if hasattr(x, "is_cuda"):
        return x.is_cuda
    return namespace(x).__name__.startswith("mlx")


ROOM = 2**22  # bytes: temporaries of that size stay in a CPU's cache, and smaller ones are not worth more steps
ACCELERATOR_ROOM = 2**29


def blocks(length: int, size: int, beside: Array) -> list[slice]:
    """Slices of an axis of `length` whose temporaries take no more at a time than the array that they come from.

    Parameters
    ----------
    length : int
    size : int
        Bytes that temporaries of the whole axis would take.
    beside : array
        What memory is needed for anyway. Temporaries may take as much, or `ROOM` where it is small.
    """
    room = max(beside.nbytes, ACCELERATOR_ROOM if on_accelerator(beside) else ROOM)
    step = max(1, length * room // max(size, 1))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)] or [slice(0, 0)]


def over_tokens(function: Callable[[Array], Array], x: Array, copies: int = 4) -> Array:
    """`function` of blocks of `x` `[heads, tokens, dim]`, joined along their second axis.

    `copies` says how often the function holds a block in single precision.
    """
    parts = blocks(x.shape[1], 4 * copies * math.prod(x.shape), x)
    return namespace(x).concat([function(x[:, part]) for part in parts], axis=1)


def to_numpy(x: Array) -> np.ndarray:
    """Any array as a NumPy array; 16-bit floats that NumPy does not know arrive as float32."""
    if hasattr(x, "detach"):  # torch: off the graph and the accelerator, bfloat16 widened
        x = x.detach().cpu()
        return (x.float() if x.dtype.is_floating_point and x.element_size() == 2 else x).numpy()
    if hasattr(xp := namespace(x), "bfloat16") and x.dtype == xp.bfloat16:  # MLX
        x = xp.astype(x, xp.float32)
    return np.asarray(x)


def float32(x: Array) -> Array:
    """`x` in single precision; scores and metrics are computed in it whatever the cache holds."""
    xp = namespace(x)
    return xp.astype(x, xp.float32)


def wide(x: Array) -> Array:
    """`x` in at least single precision: double where it is double."""
    return x if x.dtype == namespace(x).float64 else float32(x)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    xp = namespace(x)
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


def stable_order(x: Array) -> Array:
    """Indices that sort the last axis ascending; equal values keep their order on every kind of array."""
    xp = namespace(x)
    if xp.__name__.startswith("mlx"):  # always stable, and takes no keyword to say so
        return xp.argsort(x, axis=-1)
    return xp.argsort(x, axis=-1, stable=True)


def largest(x: Array, count: int) -> Array:
    """Indices of the `count` largest numbers of the last axis, ascending; of equal ones those that come first."""
    xp = namespace(x)
    if count == 0 or not hasattr(x, "detach"):
        return xp.sort(stable_order(-x)[..., :count], axis=-1)
    # torch: a sort takes longer than to find the last that counts and everything above it
    edge = x.topk(count, dim=-1, sorted=True).values[..., -1:]
    above, equal = x > edge, x == edge
    chosen = above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    place = xp.where(chosen, chosen.cumsum(-1) - 1, count)
    found = place.new_empty((*x.shape[:-1], count + 1))  # the last column takes those that are not chosen
    return found.scatter_(-1, place, xp.arange(x.shape[-1], device=x.device).expand(place.shape))[..., :count]


def turned(x: Array, cos: Array, sin: Array, out: Array | None = None) -> Array:
    """Channels of the first half of `[..., dim]` and those of the second as real and imaginary parts, turned.

    By angles of which the cosines and sines `[..., dim / 2]` are given. `out` is where torch shall write the result.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    if hasattr(x, "detach") and x.dtype == cos.dtype and not x.requires_grad:  # torch: with no temporary but the result
        xp, out = namespace(x), x.new_empty(x.shape) if out is None else out
        xp.multiply(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
        xp.multiply(b, cos, out=out[..., half:]).addcmul_(a, sin)
        return out
    if out is not None:
        xp = namespace(x)
        xp.multiply(a, cos, out=out[..., :half]).sub_(b * sin)
        xp.multiply(b, cos, out=out[..., half:]).add_(a * sin)
        return out
    return namespace(x).concat([a * cos - b * sin, b * cos + a * sin], axis=-1)


def lengths(x: Array) -> Array:
    """Euclidean norms over the last axis, in single precision."""
    xp = namespace(x)
    if hasattr(x, "detach"):
        narrowed = float32(x) if x.dtype == xp.float64 else x  # which the method refuses
        return narrowed.norm(dim=-1, dtype=xp.float32)
    return xp.sqrt(xp.sum(float32(x) ** 2, axis=-1))


def picked(x: Array, index: Array, axis: int) -> Array:
    """`take` by indices `[n]` of which none is negative: to look for such in torch takes three passes over them."""
    if hasattr(x, "detach"):
        return x.index_select(axis, index)
    return namespace(x).take(x, index, axis=axis)


def weighted_sums(x: Array, index: Array, gain: Array) -> Array:
    """`sum_k gain[..., k] * x[:, index[..., k]]`, `[heads, ...]`, of `x` `[heads, n]`; gains repeat over first axes."""
    xp, (*shape, reach) = namespace(x), index.shape
    if hasattr(x, "detach") and x.device.type == "cpu" and x.dtype == gain.dtype and not x.requires_grad:
        # torch: as sums over bags of rows, without what is gathered
        gain, starts = gain.expand(index.shape).reshape(-1), xp.arange(0, index.numel(), reach)
        found = xp.embedding_bag(x.T.contiguous(), index.reshape(-1), starts, per_sample_weights=gain)[0]
        return found.T.reshape(len(x), *shape)
    gathered = xp.reshape(picked(x, xp.reshape(index, (-1,)), -1), (x.shape[0], *index.shape))
    return xp.sum(gathered * gain, axis=-1)


def rows(x: Array, chosen: Array) -> Array:
    """Tokens `[..., heads, kept]` of `x` `[..., heads, tokens, dim]`, every head its own."""
    if hasattr(x, "detach") and x.is_contiguous():  # torch: whole rows, where a gather would go channel by channel
        heads = x.shape[:-2]
        first = namespace(x).arange(heads.numel(), device=x.device).view(*heads, 1) * x.shape[-2]
        found = x.flatten(0, -2).index_select(0, (chosen + first).flatten())
        return found.view(*heads, chosen.shape[-1], x.shape[-1])
    return namespace(x).take_along_axis(x, chosen[..., None], axis=-2)
