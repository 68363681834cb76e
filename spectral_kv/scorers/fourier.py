"""FourierKV: keep the tokens that a low-pass filter along the sequence can't reproduce."""

from dataclasses import dataclass

from spectral_kv.scorers.spectral import Spectral
from spectral_kv.transforms.fourier import highpass
from spectral_kv.xp import Array, namespace


@dataclass(frozen=True)
class Fourier(Spectral):
    """Norm over channels of the difference between the signal and its smooth part.

    Parameters
    ----------
    cutoff : float
        Cut-off as a fraction of the Nyquist frequency.
    taper : float
        Fraction of the pass band that rolls off as half a cosine (Tukey window); 0 is a box.
    """

    cutoff: float = 0.25
    taper: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.cutoff <= 1 and 0 <= self.taper <= 1):
            raise ValueError(f"cutoff={self.cutoff} and taper={self.taper} must lie in (0, 1] and [0, 1]")

    def energies(self, x: Array) -> list[Array]:
        return [namespace(x).sum(highpass(x, self.cutoff, self.taper) ** 2, axis=-1)]

    def deviation(self, energies: list[Array], tokens: int) -> Array:
        return namespace(energies[0]).sqrt(energies[0])
