"""A compressed cache that mlx-lm's models can decode from."""

from dataclasses import asdict

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from spectral_kv.quantization.turboquant import PackedVectors
from spectral_kv.storage.base import Stored
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.turboquant import PackedPair, TurboQuantStorage
from spectral_kv.storage.windowed import WindowedTokens

STEP = 256  # rows that dense buffers grow by; CUDA's attention wants a multiple of it


class CompressedLayer(_BaseCache):
    """Stored tokens of one layer, `[batch, kv_heads, rows, dim]`.

    A layer of mlx-lm asks its cache for `offset` before every update and rotates by it, so here it is the logical
    position of the next token, not the number of rows. Not a `KVCache`: that one uses `offset` as its write cursor too.
    Nothing is evicted while a model runs, since its mask is made before the first layer.

    Parameters
    ----------
    stored : Stored
    dtype : mlx.core.Dtype
        Of cached keys and values.
    offset : int
        Logical position of the next token.
    kept : np.ndarray, [kv_heads, rows]
        Logical positions of the stored rows; rows fed later follow one another from `offset`.
    """

    def __init__(self, stored: Stored, dtype: mx.Dtype, offset: int, kept: np.ndarray):
        self._stored, self.dtype, self.kept = stored, dtype, kept
        self.offset = self._since = offset
        self._buffers: list[mx.array] = []  # dense tokens live here once they have grown
        self._rows = stored.tokens

    @property
    def stored(self) -> Stored:
        if self._buffers:
            return DenseTokens(*(x[..., : self._rows, :] for x in self._buffers))
        return self._stored

    @property
    def positions(self) -> np.ndarray:
        """Logical positions `[kv_heads, rows]` of all rows."""
        fed = np.arange(self._since, self.offset)
        return np.concatenate([self.kept, np.broadcast_to(fed, (self.kept.shape[0], len(fed)))], axis=1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[batch, kv_heads, tokens, dim]`, and give everything back in the dtype of the arguments."""
        more = keys.shape[-2]
        new = [x.astype(self.dtype) for x in (keys, values)]
        if self._buffers or isinstance(self._stored, DenseTokens):
            self.reserve(more)
            for buffer, x in zip(self._buffers, new, strict=True):
                buffer[..., self._rows : self._rows + more, :] = x
            self._rows += more
            held_keys, held_values = self.stored.load()
        else:
            before, self._stored = self._stored, self._stored.append(*new)
            self._rows += more
            held_keys, held_values = self._stored.load()
            if more > 1:  # tokens that are fed together see one another exactly, whatever is in codes afterwards
                pairs = zip(before.load(), new, strict=True)
                held_keys, held_values = (mx.concatenate(pair, axis=-2) for pair in pairs)
        self.offset += more
        return held_keys.astype(keys.dtype), held_values.astype(values.dtype)

    def reserve(self, tokens: int) -> None:
        """Make room for so many dense tokens more, where there is less."""
        if not (self._buffers or isinstance(self._stored, DenseTokens)):
            return
        wanted = self._rows + tokens
        if not self._buffers or wanted > self._buffers[0].shape[-2]:
            old = self.stored.load()
            room = -(-wanted // STEP) * STEP - self._rows
            self._buffers = [mx.pad(x, [(0, 0), (0, 0), (0, room), (0, 0)]) for x in old]
            self._stored = None

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False):
        """Causal among new tokens, which see all rows. The rows decide, not the position: evicted tokens are gone."""
        return create_attention_mask(tokens, self._rows, return_array, window_size)

    def copy(self) -> "CompressedLayer":
        """A layer that can be extended without touching this one."""
        twin = CompressedLayer(self.stored, self.dtype, self._since, self.kept)
        twin.offset = self.offset
        return twin

    def size(self) -> int:
        return self._rows

    def empty(self) -> bool:
        return self._rows == 0

    @property
    def nbytes(self) -> int:
        """Bytes of every array that must live to continue decoding."""
        return self.stored.nbytes

    @property
    def allocated(self) -> int:
        """Bytes with the room to grow."""
        return sum(x.nbytes for x in self._buffers) if self._buffers else self.stored.nbytes

    @property
    def state(self) -> tuple:
        """All arrays and what else the layer needs, for mlx-lm's `save_prompt_cache` and its `generate`."""
        stored, where = self.stored, (self.offset, mx.array(self.positions))
        if isinstance(stored, DenseTokens):
            return (*where, *stored.load())
        coded = stored.coded
        codes = None if coded is None else [[p.codes, p.scale, p.mean] for p in (coded.keys, coded.values)]
        return (*where, stored.first, stored.recent, codes, stored.layer, asdict(stored.storage))

    @state.setter
    def state(self, state: tuple) -> None:
        offset, positions, *tokens = state
        if len(tokens) == 2:
            stored = DenseTokens(*tokens)
            dtype = stored.keys.dtype
        else:
            first, recent, codes, layer, storage = tokens
            coded = None if codes is None else PackedPair(*(PackedVectors(*parts) for parts in codes))
            stored = WindowedTokens(TurboQuantStorage(**storage), layer, tuple(first), coded, tuple(recent))
            dtype = recent[0].dtype
        CompressedLayer.__init__(self, stored, dtype, offset, np.asarray(positions))


class CompressedCache:
    """One layer of stored tokens for every layer of a model; `layers` is a `prompt_cache` for mlx-lm.

    Parameters
    ----------
    layers : list of CompressedLayer
    batch : int
        Number of equal sequences.
    """

    def __init__(self, layers: list[CompressedLayer], batch: int = 1):
        self.layers, self.batch = layers, batch

    @property
    def position(self) -> int:
        """Logical position of the next token."""
        return self.layers[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of every array that must live to continue decoding."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated(self) -> int:
        """The same with the room to grow."""
        return sum(layer.allocated for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more at once, instead of step by step."""
        for layer in self.layers:
            layer.reserve(tokens)

    def copy(self) -> "CompressedCache":
        """A cache that can be extended without touching this one."""
        return CompressedCache([layer.copy() for layer in self.layers], self.batch)
