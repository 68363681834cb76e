"""A compressed cache that transformers' models can decode from."""

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from spectral_kv.storage.base import Stored
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.spectral import SpectralTokens

ROOM = 256  # tokens


class CompressedLayer(CacheLayerMixin):
    """Stored tokens of one layer, `[batch, kv_heads, held, dim]`.

    A model asks its cache for two things before every forward pass: how long it is, from which the positions of new
    tokens follow, and how large a mask has to be. The length is the number of tokens `seen`, whatever became of them;
    the mask spans the `held` ones, which all lie before the new. So positions that a caller leaves out are right.

    Dense tokens grow in place, in buffers with room for `ROOM` more: joining arrays at every step would copy the whole
    cache a token, and slow a large cache down more than a small one. There is no room beyond `most` tokens, where it is
    known that no more are going to be held.

    Parameters
    ----------
    stored : Stored
    dtype : torch.dtype
        Of cached keys and values.
    seen : int
        Tokens fed so far: the logical position of the next one.
    positions : np.ndarray, [kv_heads, held]
        Logical positions of the stored tokens; tokens fed later follow one another from `seen`.
    most : int, optional
    """

    is_sliding = False
    row = 0  # of a batch whose sequences are layers of their own

    def __init__(self, stored: Stored, dtype: torch.dtype, seen: int, positions: np.ndarray, most: int | None = None):
        super().__init__()
        self.most = most
        self.stored, self.cache_dtype, self.seen = stored, dtype, seen
        self._stored_positions, self._fed_from = positions, seen
        self._buffers: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing waits to be made."""

    def update(self, key_states, value_states, *args, **kwargs):
        new = [x.to(self.cache_dtype) for x in (key_states, value_states)]
        before = self.stored
        if isinstance(before, DenseTokens):
            self.stored = self._grown(*new)
        else:
            self.stored = before.append(*new, self.row) if isinstance(before, SpectralTokens) else before.append(*new)
        if isinstance(before, DenseTokens) or key_states.shape[-2] == 1:
            keys, values = self.stored.load()
        else:  # tokens that are fed together see one another exactly, whatever of them is in codes afterwards
            keys, values = (torch.cat(pair, dim=-2) for pair in zip(before.load(), new, strict=True))
        self.seen += key_states.shape[-2]
        if isinstance(self.stored, SpectralTokens):
            self.stored.settle()  # layers of a group are coded when all of them have been read
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def reserve(self, tokens: int) -> None:
        """Make room for so many dense tokens more, where there is less."""
        if not isinstance(self.stored, DenseTokens):
            return
        stop = self.held + tokens
        if self._too_small(stop):
            old = self.stored.load()
            self._buffers = [x.new_empty((*x.shape[:-2], stop, x.shape[-1])) for x in old]
            for buffer, x in zip(self._buffers, old, strict=True):
                buffer[..., : self.held, :] = x
            self.stored = DenseTokens(*(buffer[..., : self.held, :] for buffer in self._buffers))

    def _grown(self, *new: torch.Tensor) -> DenseTokens:
        start, stop = self.held, self.held + new[0].shape[-2]
        if self._too_small(stop):
            room = ROOM if self.most is None else min(ROOM, max(self.most - stop, 0))
            self.reserve(stop - start + room)
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[..., start:stop, :] = x
        return DenseTokens(*(buffer[..., :stop, :] for buffer in self._buffers))

    def _too_small(self, tokens: int) -> bool:
        """Whether so many dense tokens have no place in the buffers.

        Nothing can be written to those of an inference mode that has ended.
        """
        if not self._buffers or tokens > self._buffers[0].shape[-2]:
            return True
        return self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()

    def get_seq_length(self) -> int:
        """Tokens seen: where the next one goes."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `query_length` new tokens are masked against, and the position that the first of them stands for.

        The held tokens count as the last ones before the new: each of them is seen by every new token.
        """
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        return -1

    @property
    def held(self) -> int:
        """Rows that attention reads."""
        return self.stored.tokens

    @property
    def kv_heads(self) -> int:
        return len(self._stored_positions)

    @property
    def positions(self) -> np.ndarray:
        """Logical positions `[kv_heads, held]` of all rows."""
        fed = np.arange(self._fed_from, self.seen)
        return np.concatenate([self._stored_positions, np.broadcast_to(fed, (self.kv_heads, len(fed)))], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that must live to continue decoding."""
        return self.stored.nbytes

    @property
    def position_nbytes(self) -> int:
        """Bytes of the positions of what is held in 32 bits, which must live where tokens were evicted."""
        return 0 if self.held == self.seen else 4 * len(self._stored_positions) * self.held

    @property
    def allocated(self) -> int:
        """Bytes that the allocator holds for the layer, room to grow included."""
        return sum(x.nbytes for x in self._buffers) if self._buffers else self.stored.nbytes

    def hold(self, stored: Stored, seen: int) -> None:
        """Hold `stored`, which may be views of someone else's buffers, after `seen` tokens in all."""
        self.stored, self.seen, self._buffers = stored, seen, []

    def copy(self) -> "CompressedLayer":
        """A layer that can be extended without touching this one; it makes buffers of its own when it grows."""
        positions = self.positions.astype(self._stored_positions.dtype, copy=False)
        return CompressedLayer(self.stored, self.cache_dtype, self.seen, positions, self.most)


class CompressedCache(Cache):
    """One layer of stored tokens for every layer of a model.

    Parameters
    ----------
    layers : list of CompressedLayer
    batch : int
        Number of equal sequences.
    """

    def __init__(self, layers: list[CompressedLayer], batch: int = 1):
        super().__init__(layers=layers)
        self.batch = batch

    @property
    def position(self) -> int:
        """Logical position of the next token."""
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that must live to continue decoding."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated(self) -> int:
        """Bytes that the allocator holds for it, room to grow included."""
        return sum(layer.allocated for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens more at once, instead of step by step."""
        for layer in self.layers:
            layer.reserve(tokens)

    def copy(self) -> "CompressedCache":
        """A cache that can be extended without touching this one."""
        return CompressedCache([layer.copy() for layer in self.layers], self.batch)
