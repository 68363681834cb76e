"""WaveletFourierKV: a low-pass filter inside every wavelet band, blended by how much the spectrum changes."""

from dataclasses import dataclass

import numpy as np

from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.transforms.fourier import highpass
from spectral_kv.xp import Array, namespace

SEGMENTS = 8  # of a prompt, whose spectra are compared


def segment_power(x: Array, segments: int = SEGMENTS) -> Array:
    """Power spectra `[kv_heads, segments, bins]` of equal segments of `x` `[kv_heads, tokens, dim]`, over channels."""
    xp = namespace(x)
    length = x.shape[-2] // segments
    if length < 2:  # no spectrum
        return xp.zeros_like(x[:, :segments, :1])
    pieces = xp.reshape(x[:, : segments * length], (x.shape[0], segments, length, x.shape[-1]))
    pieces = pieces - xp.mean(pieces, axis=-2, keepdims=True)
    spectrum = xp.fft.rfft(pieces, axis=-2)
    return xp.sum(xp.real(spectrum) ** 2 + xp.imag(spectrum) ** 2, axis=-1)


def nonstationarity(power: Array) -> Array:
    """How much the spectrum `[kv_heads, segments, bins]` changes from segment to segment, `[kv_heads]` in [0, 1].

    Jensen-Shannon divergence between the power spectra, each normalised to sum to one, as a fraction of its maximum
    `log(segments)`. Constant signals give 0.
    """
    xp, segments = namespace(power), power.shape[1]
    share = power / (xp.sum(power, axis=-1, keepdims=True) + 1e-30)

    def entropy(p: Array) -> Array:
        return -xp.sum(p * xp.log(p + 1e-30), axis=-1)

    divergence = entropy(xp.mean(share, axis=1)) - xp.mean(entropy(share), axis=1)
    return xp.clip(divergence / float(np.log(max(segments, 2))), 0.0, 1.0)


@dataclass(frozen=True)
class WaveletFourier(Wavelet):
    """`alpha * wavelet + (1 - alpha) * band-Fourier`.

    The band-Fourier term is the wavelet score of what a low-pass filter along each band leaves over.

    Parameters
    ----------
    cascade : bool
        Filter inside the bands; without it the Fourier term is that of the undecomposed signal.
    cutoff, taper : float
        Of the filter inside each band, as in `Fourier`, relative to the Nyquist frequency of the band's coefficients.
        With `transform=stationary` these have the rate of the tokens, where level j lies between 2^-j and 2^(1-j):
        the filter then passes the levels below the cut-off whole, and the cascade scores those above it.
    alpha : float, optional
        Share of the wavelet term; by default the measured non-stationarity of each head.
    """

    cascade: bool = True
    cutoff: float = 0.25
    taper: float = 0.5
    alpha: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.cutoff <= 1 and 0 <= self.taper <= 1):
            raise ValueError(f"cutoff={self.cutoff} and taper={self.taper} must lie in (0, 1] and [0, 1]")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in [0, 1], or be unset")

    def copies(self, x: Array) -> int:
        return super().copies(x) + self.levels

    def energies(self, x: Array) -> list[Array]:
        """Of the detail coefficients, of what the filter leaves over, and of the segments where `alpha` is measured."""
        xp, details = namespace(x), self.details(x)
        found = [xp.sum(d**2, axis=-1) for d in details]
        for band in details if self.cascade else [x]:
            found.append(xp.sum(highpass(band, self.cutoff, self.taper) ** 2, axis=-1))
        return found if self.alpha is not None else [*found, segment_power(x)]

    def deviation(self, energies: list[Array], tokens: int) -> Array:
        xp, levels = namespace(energies[0]), self.levels
        wavelet = super().deviation(energies[:levels], tokens)
        left_over = energies[levels : 2 * levels]
        fourier = super().deviation(left_over, tokens) if self.cascade else xp.sqrt(left_over[0])
        alpha = nonstationarity(energies[-1])[:, None] if self.alpha is None else self.alpha
        return alpha * wavelet + (1.0 - alpha) * fourier
