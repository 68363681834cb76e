"""Backgrounds of synthetic keys: signals along tokens, `[tokens, dim]`, of mean square 1.

Every one takes the generator that its phases and places are drawn from, the number of tokens, the number of channels
and a frequency in cycles a token. Channels differ in phase.
"""

import numpy as np

BURST_EVERY, BURST_WIDTH = 64, 8  # tokens between bursts on average, and the standard deviation of their envelope


def _wave(rng: np.random.Generator, cycles: np.ndarray, dim: int) -> np.ndarray:
    """A cosine that has gone through `cycles` `[tokens]`, in `dim` channels of random phase."""
    return np.sqrt(2.0) * np.cos(2.0 * np.pi * (cycles[:, None] + rng.random(dim)))


def _unit_power(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2))


def tone(rng: np.random.Generator, tokens: int, dim: int, frequency: float) -> np.ndarray:
    """One frequency throughout."""
    return _unit_power(_wave(rng, frequency * np.arange(tokens), dim))


def chirp(rng: np.random.Generator, tokens: int, dim: int, frequency: float) -> np.ndarray:
    """A frequency that rises in a line from a quarter of `frequency` to four times it."""
    rising = np.linspace(0.25, 4.0, tokens) * frequency
    return _unit_power(_wave(rng, np.cumsum(rising), dim))


def burst(rng: np.random.Generator, tokens: int, dim: int, frequency: float) -> np.ndarray:
    """A tone at a quarter of `frequency`, and as much power in short packets at four times it, at random places."""
    time = np.arange(tokens)
    places = rng.choice(tokens, size=max(1, tokens // BURST_EVERY), replace=False)
    envelope = np.exp(-0.5 * ((time[:, None] - places) / BURST_WIDTH) ** 2).sum(axis=1)
    packets = _unit_power(envelope[:, None] * _wave(rng, 4.0 * frequency * time, dim))
    return _unit_power(tone(rng, tokens, dim, frequency / 4.0) + packets)


def drift(rng: np.random.Generator, tokens: int, dim: int, frequency: float) -> np.ndarray:
    """A random walk, which never comes back to where it was; it has no frequency."""
    return _unit_power(np.cumsum(rng.standard_normal((tokens, dim)), axis=0))


BACKGROUNDS = {"tone": tone, "chirp": chirp, "burst": burst, "drift": drift}
