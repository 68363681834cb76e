"""What a compressed cache still says about the full one: errors of reconstructed keys and values, and of spectra."""

import numpy as np

from spectral_kv.xp import Array, like, namespace, rows, wide


def interpolated(x: Array, positions: np.ndarray, tokens: int) -> Array:
    """Kept rows brought back to every position, linearly along tokens; constant beyond the first and the last.

    Parameters
    ----------
    x : array, [heads, kept, dim]
    positions : np.ndarray of int, [heads, kept]
        Ascending.
    tokens : int
        Length of the full sequence.

    Returns
    -------
    array, [heads, tokens, dim]
        Kept rows are at their positions, unchanged.
    """
    x = wide(x)
    everywhere = np.arange(tokens)
    where = np.stack([np.interp(everywhere, own, np.arange(len(own))) for own in positions])  # in rows of x
    left = np.floor(where).astype(np.int64)
    share = like((where - left).astype(np.float32)[..., None], x)
    right = np.minimum(left + 1, x.shape[1] - 1)
    start = rows(x, like(left, x))
    return start + share * (rows(x, like(right, x)) - start)


def relative_error(reconstructed: Array, full: Array) -> Array:
    """`||x' - x|| / ||x||` over tokens and channels of `[heads, tokens, dim]`, `[heads]`."""
    xp = namespace(full)
    full = wide(full)
    error = xp.sum((wide(reconstructed) - full) ** 2, axis=(-2, -1))
    return xp.sqrt(error / xp.sum(full**2, axis=(-2, -1)))


def cosine(reconstructed: Array, full: Array) -> Array:
    """Cosine of every token's vectors, mean over tokens, of `[heads, tokens, dim]`, `[heads]`."""
    xp = namespace(full)
    a, b = wide(reconstructed), wide(full)
    norms = xp.sqrt(xp.sum(a**2, axis=-1) * xp.sum(b**2, axis=-1))
    return xp.mean(xp.sum(a * b, axis=-1) / xp.where(norms > 0, norms, xp.ones_like(norms)), axis=-1)


def spectral_distance(reconstructed: Array, full: Array) -> Array:
    """Total variation between the power spectra along tokens of `[heads, tokens, dim]`, `[heads]` in [0, 1].

    Channels are freed of their mean, their powers are added, and each spectrum is scaled to sum to 1: 0 is the same
    distribution of power over frequencies, 1 power at other frequencies altogether.
    """
    xp = namespace(full)

    def share(x: Array) -> Array:
        x = wide(x)
        spectrum = xp.fft.rfft(x - xp.mean(x, axis=-2, keepdims=True), axis=-2)
        power = xp.sum(xp.real(spectrum) ** 2 + xp.imag(spectrum) ** 2, axis=-1)
        total = xp.sum(power, axis=-1, keepdims=True)
        return power / xp.where(total > 0, total, xp.ones_like(total))

    return 0.5 * xp.sum(xp.abs(share(reconstructed) - share(full)), axis=-1)
