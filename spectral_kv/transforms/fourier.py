"""Low-pass filtering of token sequences in the frequency domain."""

import numpy as np

from spectral_kv.xp import Array, like, namespace


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


def lowpass(x: Array, cutoff: float, taper: float) -> Array:
    """The smooth part of `x` `[..., tokens, dim]` along tokens.

    The sequence is continued by reflection, `x[0..n-1], x[n-2..1]`, which is periodic without a jump: the transform
    sees no edge where the document begins and ends.
    """
    return _filtered(x, lowpass_mask(x.shape[-2], cutoff, taper))


def highpass(x: Array, cutoff: float, taper: float) -> Array:
    """What `lowpass` leaves over."""
    return _filtered(x, 1.0 - lowpass_mask(x.shape[-2], cutoff, taper))


def _filtered(x: Array, gain: np.ndarray) -> Array:
    xp = namespace(x)
    tokens = x.shape[-2]
    if tokens < 3:  # nothing to reflect
        return x * float(gain[0])
    mirror = like(np.concatenate([np.arange(tokens), np.arange(tokens - 2, 0, -1)]), x)
    spectrum = xp.fft.rfft(xp.take(x, mirror, axis=-2), axis=-2)
    return xp.fft.irfft(spectrum * like(gain[:, None], x), n=2 * tokens - 2, axis=-2)[..., :tokens, :]
