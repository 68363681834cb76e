"""TurboQuant (arXiv 2504.19874), the variant that minimises squared error: rotate, quantise, store one scalar.

A random rotation makes every channel of a vector nearly Gaussian, so one fixed Lloyd-Max codebook serves all. The
scalar kept beside the codes folds the norm and a correction of the shrinkage that plain rounding to centroids brings.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from spectral_kv.quantization.packing import pack, unpack
from spectral_kv.xp import Array, float32, like, namespace

# Lloyd-Max centroids of N(0, 1), positive half
CENTROIDS = {
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}


def codebook(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids `[2 ** bits]` for unit variance, ascending, and the thresholds between them."""
    positive = np.array(CENTROIDS[bits])
    centroids = np.concatenate([-positive[::-1], positive]).astype(np.float32)
    return centroids, (centroids[1:] + centroids[:-1]) / 2


@cache  # every layer needs its two at every step
def rotation(dim: int, seed: tuple[int, ...]) -> np.ndarray:
    """A Haar-distributed orthogonal matrix `[dim, dim]`, the same on every device for the same seed.

    Q of a Gaussian matrix, its columns signed by the diagonal of R.
    """
    q, r = np.linalg.qr(np.random.Generator(np.random.PCG64(seed)).normal(size=(dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@dataclass(frozen=True)
class Packed:
    """Quantised vectors.

    `codes` uint8 `[..., dim * bits / 8]`, `scale` float16 `[...]`, `mean` `[heads, 1, dim]` or None.
    """

    codes: Array
    scale: Array
    mean: Array | None


@dataclass(frozen=True)
class TurboQuant:
    """Encoder and decoder for vectors of one kind (keys, or values) of one layer.

    Parameters
    ----------
    bits : int
        2, 3 or 4.
    seed : int
        Of the rotation.
    correction : str
        `plain` stores the norm as the paper does, and vectors shrink; `renorm` keeps their norm (for keys),
        `unbiased` their inner product with themselves (for values).
    center : bool
        Subtract the mean over tokens of each head and channel first. Attention does not see a shift common to all keys.
    """

    bits: int
    seed: tuple[int, ...]
    correction: str
    center: bool

    def encode(self, x: Array) -> Packed:
        """Pack `[heads, tokens, dim]`; a zero vector comes back as the mean (zero without centring)."""
        xp = namespace(x)
        dim = x.shape[-1]
        centroids, thresholds = codebook(self.bits)
        y = float32(x)
        mean = None
        if self.center:
            mean = xp.astype(xp.mean(y, axis=-2, keepdims=True), xp.float16)
            y = y - float32(mean)
        norm = xp.sqrt(xp.sum(y**2, axis=-1, keepdims=True))
        y = xp.matmul(y / xp.clip(norm, 1e-12, None), like(rotation(dim, self.seed).T.copy(), x)) * dim**0.5
        codes = sum(xp.astype(y > float(t), xp.uint8) for t in thresholds)
        y_hat = xp.take(like(centroids, x), xp.reshape(xp.astype(codes, xp.int64), (-1,)), axis=0)
        y_hat = xp.reshape(y_hat, y.shape)
        dot = xp.sum(y * y_hat, axis=-1, keepdims=True)
        square = xp.sum(y * y, axis=-1, keepdims=True)
        factors = {
            "plain": lambda: xp.ones_like(square),
            "renorm": lambda: xp.sqrt(square / xp.sum(y_hat * y_hat, axis=-1, keepdims=True)),
            "unbiased": lambda: square / xp.where(dot > 0, dot, xp.ones_like(dot)),
        }
        factor = factors[self.correction]()
        scale = xp.astype((norm * factor / dim**0.5)[..., 0], xp.float16)
        return Packed(pack(codes, self.bits), scale, mean)

    def decode(self, packed: Packed) -> Array:
        """The float32 vectors `[heads, tokens, dim]` that the codes stand for."""
        xp = namespace(packed.codes)
        codes = unpack(packed.codes, self.bits)
        dim = codes.shape[-1]
        centroids, _ = codebook(self.bits)
        y = xp.reshape(
            xp.take(like(centroids, packed.codes), xp.reshape(xp.astype(codes, xp.int64), (-1,)), axis=0), codes.shape
        )
        x = xp.matmul(y * float32(packed.scale)[..., None], like(rotation(dim, self.seed), packed.codes))
        return x if packed.mean is None else x + float32(packed.mean)
