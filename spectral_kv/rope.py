"""Rotary position embedding, forwards and back, from the model's own frequencies.

Half-split layout (Llama, Qwen, Mistral in Hugging Face form): channel f is paired with channel f + dim/2.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spectral_kv.xp import Array, constant, like, namespace, picked, turned

TABLE = 4096  # positions: tables of waves grow by so many


@lru_cache(maxsize=8)  # the layers of a model share frequencies and, until an eviction, positions
def _waves(
    frequencies: bytes, positions: bytes, shape: tuple[int, ...], direction: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine `[*shape, bands]` of the phases of float64 positions and frequencies, in single precision.

    Both times `scale`, and the sine times `direction`.
    """
    places, turns = np.frombuffer(positions), np.frombuffer(frequencies)
    cos, sin = (np.empty((len(places), len(turns)), dtype=np.float32) for _ in range(2))
    for start in range(0, len(places), TABLE):  # in double precision all of them would take several tables' room
        part = slice(start, start + TABLE)
        phases = places[part, None] * turns
        cos[part], sin[part] = scale * np.cos(phases), direction * scale * np.sin(phases)
    return cos.reshape(*shape, len(turns)), sin.reshape(*shape, len(turns))


@dataclass(frozen=True)
class Rope:
    """The rotation a model applies to queries and keys.

    Parameters
    ----------
    inv_freq : np.ndarray
        Angular frequencies `[dim / 2]` in radians per token, as the model itself holds them.
    attention_scaling : float
        Factor the model multiplies into cos and sin (1 except for YaRN-like types).
    """

    inv_freq: np.ndarray
    attention_scaling: float = 1.0

    def angles(self, positions: np.ndarray) -> np.ndarray:
        """Phases `[..., dim / 2]` in float64 for integer positions `[...]`."""
        return np.asarray(positions, dtype=np.float64)[..., None] * np.asarray(self.inv_freq, dtype=np.float64)

    def rotate(self, x: Array, positions: np.ndarray) -> Array:
        """What the model does to un-rotated queries or keys `[..., tokens, dim]` at `positions` `[..., tokens]`."""
        return self._turn(x, positions, 1.0, self.attention_scaling)

    def unrotate(
        self,
        x: Array,
        positions: np.ndarray,
        tokens: slice = slice(None),
        bands: slice = slice(None),
        out: Array | None = None,
    ) -> Array:
        """The inverse of `rotate`: keys as they were before their position was written into them.

        `x` may hold some of the tokens at `positions` and some of the bands only, two channels each, those of the first
        half before those of the second. `out` is where torch shall write the result.
        """
        return self._turn(x, positions, -1.0, 1.0 / self.attention_scaling, tokens, bands, out)

    def unrotation(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine `[tokens, dim / 2]`, in single precision, by which `unrotate` turns positions from 0 on."""
        return self._waves(np.arange(tokens), -1.0, 1.0 / self.attention_scaling)

    def undoing(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`unrotation` of any positions `[tokens]`."""
        return self._waves(positions, -1.0, 1.0 / self.attention_scaling)

    def _waves(self, positions: np.ndarray, direction: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
        positions, frequencies = (np.asarray(y, dtype=np.float64) for y in (positions, self.inv_freq))
        return _waves(frequencies.tobytes(), positions.tobytes(), positions.shape, direction, scale)

    def _turn(
        self,
        x: Array,
        positions: np.ndarray,
        direction: float,
        scale: float,
        tokens: slice = slice(None),
        bands: slice = slice(None),
        out: Array | None = None,
    ) -> Array:
        xp = namespace(x)
        positions = np.asarray(positions)
        if positions.ndim > 1 and np.issubdtype(
            positions.dtype, np.integer
        ):  # after an eviction every head has its own
            table = self._waves(np.arange(-(-(int(positions.max()) + 1) // TABLE) * TABLE), direction, scale)
            positions = positions[..., tokens]
            chosen = like(positions.reshape(-1), x)
            cos, sin = (
                xp.reshape(picked(constant(wave, x)[:, bands], chosen, 0), (*positions.shape, -1)) for wave in table
            )
        else:
            cos, sin = (constant(wave, x)[..., tokens, bands] for wave in self._waves(positions, direction, scale))
        return turned(x, cos, sin, out)
