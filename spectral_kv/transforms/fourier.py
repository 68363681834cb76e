"""Low-pass filtering of token sequences in the frequency domain."""

from functools import lru_cache

import numpy as np
from scipy.fft import next_fast_len

from spectral_kv.xp import Array, constant, namespace, picked

MARGIN = 64  # tokens
FAR = 512  # tokens beyond which a filter with a smooth edge has no response to speak of
LOST = 5e-6  # of the norm of its response that may lie further away


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


@lru_cache(maxsize=16)
def surroundings(tokens: int) -> np.ndarray:
    """A stretch of `continuation`, `[length]`: the sequence with at least `FAR` tokens before and after it.

    As a period it jumps, but nowhere that a filter which dies out could see from a token, and it is little more than
    half as long.
    """
    return continuation(tokens)[np.arange(next_fast_len(tokens + 2 * FAR)) - FAR]


@lru_cache(maxsize=16)
def dies_out(cutoff: float, taper: float) -> bool:
    """Whether the low-pass filter has no response to speak of beyond `FAR` tokens; a box never does."""
    response = np.fft.irfft(lowpass_mask(8 * FAR + 1, cutoff, taper)) ** 2
    return bool(response[FAR:-FAR].sum() < LOST**2 * response.sum())


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
    start = FAR if tokens > 4 * FAR and dies_out(cutoff, taper) else 0
    index = surroundings(tokens) if start else continuation(tokens)
    spectrum = xp.fft.rfft(picked(x, constant(index, x), -2), axis=-2)
    spectrum *= constant(_gain(len(index) // 2 + 1, cutoff, taper, stop), x)
    return xp.fft.irfft(spectrum, n=len(index), axis=-2)[..., start : start + tokens, :]
