"""Rows of one layer in buffers that stay where they are, with their numbers on the device."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import unpack


class Rows(Protocol):
    """What attention of one layer reads. `attend` writes a row and counts it only for itself: who steps, counts."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Write the new row `k`, `v` `[batch, kv_heads, 1, dim]` and attend to all rows.

        From queries `[batch, query_heads, 1, dim]` to outputs of the same shape.
        """
        ...


def _write(buffer: torch.Tensor, lengths: torch.Tensor, row: torch.Tensor) -> None:
    """Put `row` `[batch, kv_heads, 1, dim]` behind the `lengths` `[batch, kv_heads]` rows of every head."""
    counts = lengths.flatten().tolist()
    if min(counts) == max(counts):  # in a tenth of the time
        buffer[:, :, counts[0]] = row[:, :, 0]
        return
    where = lengths.long()[..., None, None].expand(*row.shape[:2], 1, row.shape[-1])
    buffer.scatter_(-2, where, row.to(buffer.dtype))


def _seen(lengths: torch.Tensor, more: int = 0) -> tuple[int, torch.Tensor | None]:
    """The most rows of a head, and which of so many count, `[batch, kv_heads, rows]`; None if all do.

    `more` rows of every head count beside its `lengths` `[batch, kv_heads]`.
    """
    counts = lengths.flatten().tolist()
    rows = max(counts) + more
    if min(counts) + more == rows:
        return rows, None
    return rows, torch.arange(rows, device=lengths.device) < lengths[..., None] + more


def _counted(buffer: torch.Tensor, rows: int, seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The first `rows` rows, zero where they don't count: what lies there may be anything."""
    x = buffer[:, :, :rows].to(dtype)
    return x if seen is None else x.masked_fill(~seen[..., None], 0)


def _softmax(logits: list[torch.Tensor], seen: list[torch.Tensor | None]) -> torch.Tensor:
    """Weights over the rows of all parts `[batch, kv_heads, group, rows]`, of which those `seen` count."""
    masked = [x if s is None else x.masked_fill(~s[:, :, None], -torch.inf) for x, s in zip(logits, seen, strict=True)]
    return torch.cat(masked, -1).softmax(-1)


@dataclass
class DenseRows:
    """Keys and values `[batch, kv_heads, capacity, dim]`, of which the first `lengths` `[batch, kv_heads]` count."""

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    query_heads: int

    def __post_init__(self):
        self.launch = None
        if self.keys.is_cuda:
            from spectral_kv.engine.launch import DenseLaunch

            self.launch = DenseLaunch(self.keys, self.query_heads)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self.launch is not None:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            return self.launch(q, k, v, self.keys, self.values, self.lengths, scale)
        _write(self.keys, self.lengths, k)
        _write(self.values, self.lengths, v)
        rows, seen = _seen(self.lengths, 1)
        mask = None if seen is None else seen.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, None]
        keys, values = (_counted(x, rows, seen, q.dtype) for x in (self.keys, self.values))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True)


@dataclass
class Coded:
    """Rows in TurboQuant codes, `[batch, kv_heads, capacity]` of them, of which the first `lengths` count.

    Parameters
    ----------
    key_codes, value_codes : uint8 [batch, kv_heads, capacity, dim * bits / 8]
    key_scales, value_scales : float16 [batch, kv_heads, capacity]
    mean : [batch, kv_heads, dim]
        What was subtracted from keys.
    key_rotation, value_rotation : [dim, dim]
        By which queries are multiplied once, and results once.
    bits : pair of int
        Of keys and of values.
    lengths : int64 [batch, kv_heads]
    """

    key_codes: torch.Tensor
    key_scales: torch.Tensor
    value_codes: torch.Tensor
    value_scales: torch.Tensor
    mean: torch.Tensor
    key_rotation: torch.Tensor
    value_rotation: torch.Tensor
    bits: tuple[int, int]
    lengths: torch.Tensor

    def __post_init__(self):
        self.tables = tuple(torch.from_numpy(codebook(b)[0]).to(self.key_codes.device) for b in self.bits)


@dataclass
class CodedRows:
    """Coded rows, and dense ones beside them to which new rows go.

    Their order does not matter to attention: keys carry their rotation.

    Parameters
    ----------
    keys, values : [batch, kv_heads, capacity, dim]
        The dense rows, of which the first `lengths` `[batch, kv_heads]` count.
    dtype : torch.dtype
        Of queries: in float32 centroids are products of float32, otherwise of float16.
    """

    coded: Coded
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    query_heads: int
    dtype: torch.dtype

    def __post_init__(self):
        self.launch = None
        if self.keys.is_cuda:
            from spectral_kv.engine.launch import CodedLaunch

            wide = self.dtype == torch.float32
            self.launch = CodedLaunch(
                self.coded.key_codes, self.keys.shape[-1], self.coded.bits, self.query_heads, wide, ptx=True
            )
        else:
            dim, c = self.keys.shape[-1], self.coded
            self._lookups = tuple(Lookup(bits, dim) for bits in c.bits)
            self._key_rotation = c.key_rotation.float()[:, self._lookups[0].order]
            self._value_rotation = c.value_rotation.float()[self._lookups[1].order]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self.launch is not None:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            return self.launch(q, k, v, self.coded, (self.keys, self.values), self.lengths, scale)
        _write(self.keys, self.lengths, k)
        _write(self.values, self.lengths, v)
        c, (batch, heads, _, dim) = self.coded, self.keys.shape
        queries = (scale * q.float()).view(batch, heads, -1, dim)
        (exact, seen), (coded, seen_coded) = _seen(self.lengths, 1), _seen(c.lengths)
        keys, values = (_counted(x, exact, seen, torch.float32) for x in (self.keys, self.values))
        logits = queries @ keys.mT
        if not coded:
            return (_softmax([logits], [seen]) @ values).view(q.shape).to(q.dtype)
        products = queries @ self._key_rotation @ self._lookups[0](c.key_codes[:, :, :coded]).mT
        shift = queries @ c.mean.float()[..., None]
        coded_logits = torch.addcmul(shift, products, c.key_scales[:, :, None, :coded].float())
        weights = _softmax([logits, coded_logits], [seen, seen_coded])
        scaled = weights[..., exact:] * c.value_scales[:, :, None, :coded]
        turned = scaled @ self._lookups[1](c.value_codes[:, :, :coded])
        out = weights[..., :exact] @ values + turned @ self._value_rotation
        return out.view(q.shape).to(q.dtype)


@lru_cache(maxsize=4)
def _fours(bits: int) -> torch.Tensor:
    """The four numbers that 2 bytes of 4-bit codes, or 1 byte of 2-bit codes, stand for, as one element of 16 bytes."""
    count = bits // 2
    every = np.arange(256**count, dtype="<u2").view(np.uint8).reshape(-1, 2)[:, :count]
    fours = codebook(bits)[0][unpack(every[..., None], bits)].reshape(len(every), 4)
    return torch.from_numpy(np.ascontiguousarray(fours, dtype=np.float32)).view(torch.complex128).reshape(-1)


class Lookup:
    """Centroids of codes by a table over bytes, with channels in the order in which bytes hold them.

    Bringing them into their own order would copy them all; `order` does the same to a rotation once. A lookup takes as
    long for 16 bytes of numbers as for 8, and a fifth of what it takes for rows of a table in two dimensions. `gather`
    reads 64-bit indices in two thirds of the time in which `index_select` reads narrower ones, and where a vector is a
    row of its own on all cores.
    """

    def __init__(self, bits: int, dim: int):
        self.bits = bits
        if bits == 3:  # two planes
            self.order = np.arange(dim)
            self.table = torch.from_numpy(codebook(3)[0])
        else:
            self.order = np.arange(dim).reshape(8 // bits, -1).T.ravel()
            self.table = _fours(bits)

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 `[..., tokens, dim]` of codes `[..., tokens, dim * bits / 8]`."""
        if self.bits == 3:
            return self.table[unpack(codes, 3).long()]
        index = (codes.view(torch.uint16) if self.bits == 4 else codes).long().flatten(0, -2)
        flat = self.table.expand(len(index), -1).gather(1, index)
        return flat.view(torch.float32).view(*codes.shape[:-1], -1)
