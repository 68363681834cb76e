"""Ridge-KVzap: KVzip's verdict foretold from a token's key and value by a linear map (KVzap, arXiv 2601.07891)."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from spectral_kv.scorers.base import LayerView, norms
from spectral_kv.xp import Array, float32, like, namespace, to_numpy

SMALLEST = 1e-6  # weight, of which the logarithm is foretold


@dataclass
class KVzapWeights:
    """A map for every layer and KV head, from `features` to the logarithm of KVzip's score.

    Parameters
    ----------
    maps : np.ndarray, [layers, kv_heads, features]
    metadata : dict of str
        What they were fitted to: model hash, text, tokens, share of the variance that they foretell.
    """

    maps: np.ndarray
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers."""
        return hashlib.sha256(self.maps.tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        from safetensors.numpy import save_file

        save_file({"maps": np.ascontiguousarray(self.maps, dtype=np.float32)}, str(path), self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "KVzapWeights":
        """Read a file that `save` wrote.

        Raises
        ------
        ValueError
            If it holds something else, or what is not a number.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                found = cls(file.get_tensor("maps"), file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} does not hold maps of Ridge-KVzap ({error})") from None
        if found.maps.ndim != 3 or not np.isfinite(found.maps).all():
            raise ValueError(f"{path} holds maps of shape {list(found.maps.shape)} or what is not a number")
        return found


@lru_cache(maxsize=4)
def _read(path: str, changed: int) -> KVzapWeights:
    return KVzapWeights.load(path)


def features(layer: LayerView) -> Array:
    """Key before RoPE, value, their norms and 1, float32 `[kv_heads, tokens, 2 dim + 3]`.

    Key and value are linear in the layer's input, which KVzap reads: here they are what a cache still holds.
    """
    xp = namespace(layer.keys)
    lengths = xp.stack([layer.key_norms, norms(layer.values), xp.ones_like(layer.key_norms)], axis=-1)
    return xp.concat([layer.unrotated, float32(layer.values), lengths], axis=-1)


@dataclass(frozen=True)
class RidgeKVzap:
    """The foretold logarithm of KVzip's score; nothing is repeated, and tokens can be scored while decoding.

    Parameters
    ----------
    weights : str
        File of the model's maps, which `python -m pipeline.calibrate --kvzap` writes.
    """

    weights: str | None = None

    reads: ClassVar[tuple[str, ...]] = ("keys", "values")

    @property
    def fitted(self) -> KVzapWeights:
        """The maps of `weights`."""
        if self.weights is None:
            raise ValueError("weights= is not given: Ridge-KVzap needs maps that were fitted to the model")
        return _read(self.weights, Path(self.weights).stat().st_mtime_ns)

    def score(self, layer: LayerView) -> Array:
        maps, heads = self.fitted.maps, slice(layer.first_head, layer.first_head + len(layer.keys))
        x = features(layer)
        if layer.index >= len(maps) or maps.shape[-1] != x.shape[-1] or heads.stop > maps.shape[1]:
            raise ValueError(
                f"weights={self.weights} are for [layers, KV heads, features] = {list(maps.shape)}, and layer "
                f"{layer.index} has {heads.stop} heads of {x.shape[-1]} features: fit them to this model"
            )
        return namespace(x).matmul(x, like(maps[layer.index, heads], x)[..., None])[..., 0]


class Ridge:
    """Running sums of a ridge regression a layer and KV head, so that any amount of text fits in memory."""

    def __init__(self, layers: int, kv_heads: int, count: int):
        self.gram = np.zeros((layers, kv_heads, count, count))
        self.cross = np.zeros((layers, kv_heads, count))
        self.squares = np.zeros((layers, kv_heads, 3))  # number, sum and sum of squares of what is foretold

    def add(self, layer: LayerView, scores: Array) -> None:
        """Count KVzip's scores `[kv_heads, tokens]` of a layer's evictable tokens."""
        x = to_numpy(features(layer))[:, layer.evictable].astype(np.float64)
        y = np.log(np.maximum(to_numpy(scores)[:, layer.evictable].astype(np.float64), SMALLEST))
        self.gram[layer.index] += x.transpose(0, 2, 1) @ x
        self.cross[layer.index] += (x.transpose(0, 2, 1) @ y[..., None])[..., 0]
        self.squares[layer.index] += np.stack([np.full(len(y), y.shape[1]), y.sum(1), (y**2).sum(1)], axis=-1)

    def fit(self, strength: float, **metadata: str) -> KVzapWeights:
        """The maps, with a penalty of `strength` times the mean diagonal of X'X on all but the constant."""
        count = self.gram.shape[-1]
        size = np.trace(self.gram, axis1=-2, axis2=-1)[..., None, None] / count
        penalty = np.diag(np.append(np.ones(count - 1), 0.0))
        maps = np.linalg.solve(self.gram + strength * size * penalty, self.cross[..., None])[..., 0]
        number, total, squares = np.moveaxis(self.squares, -1, 0)
        variance = squares - total**2 / number
        error = squares - 2 * (maps * self.cross).sum(-1) + np.einsum("lhi,lhij,lhj->lh", maps, self.gram, maps)
        foretold = {"variance": f"{1 - error.sum() / variance.sum():.3f}", "tokens": f"{number.max():.0f}"}
        return KVzapWeights(maps, {k: str(v) for k, v in metadata.items()} | foretold)
