"""Numbers that stay as they are, in fewer bytes: exponents are alike and coded by their frequencies, mantissas are not.

The bytes of a number are taken apart. The one with the sign and the first seven bits of the exponent (or what stands
there in 16 bits) is coded, the others are stored, and those that are zero in all numbers are left out.
"""

import numpy as np

from spectral_kv.codec.entropy import Tables, histogram
from spectral_kv.xp import Array, to_numpy


def encode(arrays: list[Array]) -> dict[str, np.ndarray]:
    """Tensors, by name, that stand for arrays of floating-point numbers of one dtype; each array is a context."""
    flat = [np.ascontiguousarray(to_numpy(x)).ravel() for x in arrays]
    numbers = np.concatenate(flat)
    little = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
    planes = little.view(np.uint8).reshape(-1, numbers.dtype.itemsize)
    kept = [i for i in range(planes.shape[1] - 1) if planes[:, i].any()]
    top = planes[:, -1].astype(np.int16)
    signed = ((top & 127) + 1) * np.where(top & 128, -1, 1)
    contexts = _contexts([len(x) for x in flat])
    tables = Tables.of(histogram(signed, contexts, len(flat)))
    return {
        "words": tables.encode(signed, contexts),
        "codes": tables.codes,
        "lengths": tables.lengths,
        "planes": np.concatenate([np.array(kept, dtype=np.uint8), planes[:, kept].T.ravel()]),
        "itemsize": np.array([numbers.dtype.itemsize, len(kept)], dtype=np.uint8),
    }


def decode(tensors: dict[str, np.ndarray], shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The arrays of such shapes that the tensors stand for."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    itemsize, count = (int(x) for x in tensors["itemsize"])
    planes = np.zeros((sum(sizes), itemsize), dtype=np.uint8)
    kept, stored = tensors["planes"][:count], tensors["planes"][count:].reshape(count, len(planes))
    planes[:, kept] = stored.T
    signed = Tables(tensors["codes"], tensors["lengths"]).decode(tensors["words"], _contexts(sizes))
    planes[:, -1] = (np.abs(signed) - 1) | np.where(signed < 0, 128, 0)
    numbers = planes.view(f"<f{itemsize}").ravel().astype(f"f{itemsize}", copy=False)
    return [x.reshape(shape) for x, shape in zip(np.split(numbers, np.cumsum(sizes)[:-1]), shapes, strict=True)]


def _contexts(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
