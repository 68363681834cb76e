"""Dense: keys and values in the dtype of the cache."""

from dataclasses import dataclass

from spectral_kv.xp import Array, namespace, rows


@dataclass(frozen=True)
class DenseTokens:
    keys: Array
    values: Array

    @property
    def tokens(self) -> int:
        return self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def load(self) -> tuple[Array, Array]:
        return self.keys, self.values

    def append(self, keys: Array, values: Array) -> "DenseTokens":
        xp = namespace(keys)
        return DenseTokens(xp.concat([self.keys, keys], axis=-2), xp.concat([self.values, values], axis=-2))

    def take(self, kept: Array) -> "DenseTokens":
        return DenseTokens(rows(self.keys, kept), rows(self.values, kept))

    def tensors(self) -> dict[str, Array]:
        return {"keys": self.keys, "values": self.values}


@dataclass(frozen=True)
class Dense:
    """Keys and values in the dtype of the cache."""

    def store(self, keys: Array, values: Array, layer: int) -> DenseTokens:
        return DenseTokens(keys, values)

    def restored(self, tensors: dict[str, Array], layer: int) -> DenseTokens:
        return DenseTokens(**tensors)

    def nbytes(self, tokens: int, kv_heads: int, dim: int, itemsize: int) -> int:
        return 2 * kv_heads * tokens * dim * itemsize
