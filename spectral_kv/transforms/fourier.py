"""Low-pass filtering of token sequences in the frequency domain."""

from functools import lru_cache

import numpy as np
from scipy.fft import next_fast_len

from spectral_kv.xp import Array, constant, namespace

MARGIN = 64  # tokens


def lowpass_mask(bins: int, cutoff: float, taper: float) -> np.ndarray:
    """Gain `[bins]` for frequencies from 0 to Nyquist.

    One below `cutoff * (1 - taper)`, zero above `cutoff`, half a cosine between: a Tukey window in frequency. `taper=0`
    is a box.

    Parameters
    ----------
    cutoff, taper : float
        Cut-off as a fraction of the Nyquist frequency, and the fraction of the pass band that rolls off; both in
        [0, 1].
    """
    frequency = np.linspace(0.0, 1.0, bins)
    start = cutoff * (1.0 - taper)
    roll = 0.5 * (1.0 + np.cos(np.pi * np.clip((frequency - start) / max(cutoff - start, 1e-12), 0.0, 1.0)))
    return np.where(frequency <= start, 1.0, np.where(frequency > cutoff, 0.0, roll)).astype(np.float32)


@lru_cache(maxsize=16)
def continuation(tokens: int) -> np.ndarray:
    """Source index of one period of a sequence of `tokens` that goes on by reflection, `[period]`.

    The period has no jump: the transform sees no edge where the document begins and ends. A large prime factor in its
    length `2 * tokens - 2` would make the transform several times slower than any other step; such a sequence is first
    reflected at its last token up to a longer, faster length, `MARGIN` tokens away at least.
    """
    last = tokens - 1
    if next_fast_len(last) > last:
        last = next_fast_len(last + min(MARGIN, last - 1))
    reflected = np.concatenate([np.arange(tokens), np.arange(tokens - 2, -1, -1)])[: last + 1]
    return np.concatenate([reflected, reflected[-2:0:-1]])


def lowpass(x: Array, cutoff: float, taper: float) -> Array:
    """The smooth part of `x` `[..., tokens, dim]` along tokens."""
    return _filtered(x, cutoff, taper, stop=False)


def highpass(x: Array, cutoff: float, taper: float) -> Array:
    """What `lowpass` leaves over."""
    return _filtered(x, cutoff, taper, stop=True)


@lru_cache(maxsize=16)
def _gain(bins: int, cutoff: float, taper: float, stop: bool) -> np.ndarray:
    """Gain `[bins, 1]` of what passes, or of what is left over."""
    gain = lowpass_mask(bins, cutoff, taper)[:, None]
    return 1.0 - gain if stop else gain


def _filtered(x: Array, cutoff: float, taper: float, stop: bool) -> Array:
    xp = namespace(x)
    tokens = x.shape[-2]
    if tokens < 3:  # nothing to reflect
        return x * float(not stop)
    index = continuation(tokens)
    spectrum = xp.fft.rfft(xp.take(x, constant(index, x), axis=-2), axis=-2)
    spectrum = spectrum * constant(_gain(len(index) // 2 + 1, cutoff, taper, stop), x)
    return xp.fft.irfft(spectrum, n=len(index), axis=-2)[..., :tokens, :]
