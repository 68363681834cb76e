"""A rate for all blocks of a model: bits go where they save most nats, in any layer, keys or values."""

from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakValueDictionary

from spectral_kv.codec.allocation import water_filling
from spectral_kv.codec.bases import Bases
from spectral_kv.codec.fixed_rate import GAIN_BITS, FixedRate


@dataclass(frozen=True)
class Rate:
    """Coders of all blocks at one rate."""

    coders: tuple[FixedRate, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in all blocks."""
        return sum(coder.token_bytes for coder in self.coders)


_bases: WeakValueDictionary[str, Bases] = WeakValueDictionary()  # for as long as somebody has them


def rate(bases: Bases, token_bytes: int) -> Rate:
    """The best coders of which all together take at most so many bytes a token.

    Raises
    ------
    ValueError
        If that is not enough for any component of some block.
    """
    _bases[bases.digest] = bases
    return _rate(bases.digest, token_bytes)


@lru_cache(maxsize=8)  # matrices of the sizes of the bases each
def _rate(digest: str, token_bytes: int) -> Rate:
    bases = _bases[digest]
    bits = water_filling([block.variances for block in bases.blocks], 8 * token_bytes, GAIN_BITS)
    for block, given in zip(bases.blocks, bits, strict=True):
        if not given.any():
            raise ValueError(
                f"{token_bytes} bytes a token leave nothing for layers {block.layers[0]} to {block.layers[-1]}: "
                "give a lower ratio or more bits"
            )
    return Rate(tuple(FixedRate(block, given) for block, given in zip(bases.blocks, bits, strict=True)))
