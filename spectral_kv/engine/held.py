"""Caches in buffers with room to grow, over which a captured step can be replayed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spectral_kv.engine.rows import Coded, CodedRows, DenseRows
from spectral_kv.engine.step import Counters, Forward, Step
from spectral_kv.quantization.rotation import ROTATIONS, rounded
from spectral_kv.quantization.turboquant import PackedVectors, TurboQuant
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.turboquant import PackedPair
from spectral_kv.storage.windowed import WindowedTokens


def viewers(buffer: torch.Tensor) -> int:
    """How many tensors look at the memory of a buffer."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)


class Held:
    """Base: buffers for the rows of all layers of a cache, and the step over them.

    `layers` are those of a cache; what each has `stored` is copied into the buffers, and views of them take its place.

    Parameters
    ----------
    layers : list
    query_heads : int
    capacity : int
        Rows that fit, those to come included.
    forward : callable
        As `Step` takes it.
    dtype : torch.dtype
        Of the model's arithmetic.
    captured : bool
    """

    def __init__(
        self, layers: list[Any], query_heads: int, capacity: int, forward: Forward, dtype: torch.dtype, captured: bool
    ):
        like = self._exact(layers)
        self.batch, kv_heads = like.shape[:2]
        self.capacity, self.query_heads, self.dtype = capacity, query_heads, dtype
        self.counters = Counters(len(layers), self.batch, kv_heads, like.device)
        self._described = self._description(layers)
        self.rows = self._rows(layers)
        self.load(layers)
        self.counters.start(0, self.dense)
        self.step = Step(forward, self.rows, self.counters, self.batch, capacity, captured)

    @property
    def free(self) -> bool:
        """Whether nobody else looks into the buffers, so that another cache can have them."""
        return [viewers(x) for x in self.buffers] == self._alone

    def suits(self, layers: list[Any], count: int) -> bool:
        """Whether rows of this kind and shape can be copied in, with `count` more to come."""
        return len(layers) == len(self.rows) and self._description(layers) == self._described

    def is_of(self, layers: list[Any]) -> bool:
        """Whether the rows are in these buffers already, and those of no copy of the cache.

        Rows to come are written behind those that are there: a copy that went on would find those of the other.
        """
        if self._where(layers) != self.buffers[0].data_ptr():
            return False
        return [viewers(x) for x in self.buffers] == [a + v for a, v in zip(self._alone, self._views, strict=True)]

    @torch.inference_mode()
    def generate(self, layers: list[Any], ids: torch.Tensor, count: int) -> torch.Tensor:
        """Feed `ids` `[batch]` and decode greedily: tokens `[count, batch]`, by which the cache grows."""
        self.load(layers)
        self.counters.start(layers[0].seen, self.dense)
        self.step.ids.copy_(ids[:, None])
        for _ in range(count):
            self.make_room()
            self.step.run()
            self.dense += 1
        self.keep(layers, layers[0].seen + count)
        return self.step.generated[:count].clone()


class HeldDense(Held):
    """Dense keys and values."""

    @staticmethod
    def _exact(layers: list[Any]) -> torch.Tensor:
        return layers[0].stored.keys

    @staticmethod
    def _where(layers: list[Any]) -> int:
        return layers[0].stored.keys.data_ptr()

    @staticmethod
    def _description(layers: list[Any]) -> tuple:
        keys = layers[0].stored.keys
        return (*keys.shape[:2], keys.shape[-1], keys.dtype)

    def _rows(self, layers: list[Any]) -> list[DenseRows]:
        """One layer after the other gives up what it had: no more than one of them lives twice."""
        rows, self._alone = [], []
        for index, layer in enumerate(layers):
            old = (layer.stored.keys, layer.stored.values)
            n = layer.stored.tokens
            keys, values = (x.new_empty((*x.shape[:2], self.capacity, x.shape[-1])) for x in old)
            rows.append(DenseRows(keys, values, self.counters.lengths[index], self.query_heads))
            for buffer, x in zip((keys, values), old, strict=True):
                self._alone.append(viewers(buffer))
                buffer[:, :, :n] = x
            layer.hold(DenseTokens(keys[:, :, :n], values[:, :, :n]), layer.seen)
            del old
        return rows

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [x for row in self.rows for x in (row.keys, row.values)]

    @property
    def _views(self) -> list[int]:
        """How many tensors of one cache look into each buffer."""
        return [1] * len(self.buffers)

    def load(self, layers: list[Any]) -> None:
        self.dense = layers[0].stored.tokens
        for layer, row in zip(layers, self.rows, strict=True):
            if layer.stored.keys.data_ptr() != row.keys.data_ptr():
                row.keys[:, :, : self.dense] = layer.stored.keys
                row.values[:, :, : self.dense] = layer.stored.values

    def make_room(self) -> None: ...

    def keep(self, layers: list[Any], seen: int) -> None:
        for layer, row in zip(layers, self.rows, strict=True):
            layer.hold(DenseTokens(row.keys[:, :, : self.dense], row.values[:, :, : self.dense]), seen)


@dataclass(frozen=True)
class _LayersQuantizer(TurboQuant):
    """The quantisers of all layers in one: the first axis of what it encodes are layers, each with its rotation."""

    matrices: torch.Tensor | None = None  # [layers, 1, 1, dim, dim]

    def _rotate(self, unit: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.round(unit * 2**11) / 2**11, self.matrices)


def _together(quantizers: list[TurboQuant], dim: int, device: torch.device) -> _LayersQuantizer:
    q = quantizers[0]
    matrices = np.stack([rounded(q.rotation, dim, x.seed) for x in quantizers]).astype(np.float32)
    matrices = torch.from_numpy(matrices)[:, None, None].to(device)
    return _LayersQuantizer(q.bits, q.seed, q.correction, q.center, q.rotation, matrices)


class HeldCoded(Held):
    """TurboQuant codes, and a ring of exact rows: sinks, the recent window, and what is fed.

    The oldest of the recent rows are coded when `flush` of them have left the window, by one captured run over all
    layers.
    """

    @staticmethod
    def _exact(layers: list[Any]) -> torch.Tensor:
        return layers[0].stored.recent[0]

    @staticmethod
    def _where(layers: list[Any]) -> int:
        coded = layers[0].stored.coded
        return 0 if coded is None else coded.keys.codes.data_ptr()

    @staticmethod
    def _description(layers: list[Any]) -> tuple:
        stored = layers[0].stored
        shape = stored.recent[0].shape
        return (*shape[:2], shape[-1], stored.recent[0].dtype, stored.first[0].shape[-2], stored.storage)

    def _rows(self, layers: list[Any]) -> list[CodedRows]:
        stored = layers[0].stored
        storage, exact = stored.storage, stored.recent[0]
        (batch, heads), dim, device, count = exact.shape[:2], exact.shape[-1], exact.device, len(layers)
        self.storage, self.sinks = storage, stored.first[0].shape[-2]
        self.indices = [layer.stored.layer for layer in layers]
        codecs = [storage.codec(i) for i in self.indices]
        quantizers = [[c.keys for c in codecs], [c.values for c in codecs]]
        self.bits = (storage.key_bits, storage.value_bits)
        capacity = -(-self.capacity // storage.flush) * storage.flush
        ring = (count, batch, heads, self.sinks + storage.recent + storage.flush, dim)
        self.ring = [torch.zeros(ring, dtype=exact.dtype, device=device) for _ in range(2)]
        shape = (count, batch, heads, capacity)
        self.codes = [torch.zeros((*shape, dim * b // 8), dtype=torch.uint8, device=device) for b in self.bits]
        self.scales = [torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(2)]
        self.mean = torch.zeros((count, batch, heads, 1, dim), dtype=torch.float16, device=device)
        self.coded_lengths = torch.zeros(batch, heads, dtype=torch.int64, device=device)
        self.quantizers = [_together(q, dim, device) for q in quantizers]
        self._chunk = torch.arange(storage.flush, device=device)
        self._flushing: torch.cuda.CUDAGraph | None = None
        wide = torch.float32 if self.dtype == torch.float32 or device.type == "cpu" else torch.float16
        rows = []
        for i in range(count):
            key_turn, value_turn = (
                torch.from_numpy(ROTATIONS[q[i].rotation](dim, q[i].seed)).to(device, wide) for q in quantizers
            )
            coded = Coded(
                self.codes[0][i], self.scales[0][i], self.codes[1][i], self.scales[1][i], self.mean[i, :, :, 0],
                key_turn.T.contiguous(), value_turn.contiguous(), self.bits, self.coded_lengths,
            )  # fmt: skip
            lengths = self.counters.lengths[i]
            rows.append(CodedRows(coded, self.ring[0][i], self.ring[1][i], lengths, self.query_heads, self.dtype))
        del coded
        self._alone = [viewers(x) for x in self.buffers]
        return rows

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [*self.codes, *self.scales, self.mean]  # nobody else looks into the ring

    @property
    def _views(self) -> list[int]:
        """How many tensors of one cache look into each buffer."""
        layers = len(self.rows)
        return [layers] * 4 + [layers if self.quantizers[0].center else 0]

    def load(self, layers: list[Any]) -> None:
        first = layers[0].stored
        self.coded = 0 if first.coded is None else first.coded.tokens
        self.dense = self.sinks + first.recent[0].shape[-2]
        self.coded_lengths.fill_(self.coded)
        for i, layer in enumerate(layers):
            stored = layer.stored
            for ring, exact, recent in zip(self.ring, stored.first, stored.recent, strict=True):
                ring[i, :, :, : self.sinks] = exact
                ring[i, :, :, self.sinks : self.dense] = recent
            if stored.coded is None or stored.coded.keys.codes.data_ptr() == self.codes[0][i].data_ptr():
                continue
            for side, packed in enumerate((stored.coded.keys, stored.coded.values)):
                self.codes[side][i, :, :, : self.coded] = packed.codes
                self.scales[side][i, :, :, : self.coded] = packed.scale
            if stored.coded.keys.mean is not None:
                self.mean[i] = stored.coded.keys.mean

    def make_room(self) -> None:
        """Code a chunk of the recent window if the next row would push it out."""
        if self.dense + 1 - self.sinks - self.storage.recent < self.storage.flush:
            return
        if self.coded == 0 and self.quantizers[0].center:  # the mean key is that of the first chunk
            chunk = self.ring[0][:, :, :, self.sinks : self.sinks + self.storage.flush]
            self.mean.copy_(self.quantizers[0].encode(chunk).mean)
        if self._flushing is None and self.step.captured:
            self._flushing = self._captured_flush()
        if self._flushing is None:
            self._flush()
        else:
            self._flushing.replay()
        self.coded += self.storage.flush
        self.dense -= self.storage.flush

    def _flush(self) -> None:
        start, flush = self.sinks, self.storage.flush
        means = (self.mean if self.quantizers[0].center else None, None)
        where = self.coded_lengths[:1, 0] + self._chunk
        for side, ring in enumerate(self.ring):
            packed = self.quantizers[side].encode(ring[:, :, :, start : start + flush], means[side])
            self.codes[side].index_copy_(3, where, packed.codes)
            self.scales[side].index_copy_(3, where, packed.scale)
            ring[:, :, :, start:-flush] = ring[:, :, :, start + flush :].clone()
        self.counters.lengths.sub_(flush)
        self.coded_lengths.add_(flush)

    def _captured_flush(self) -> torch.cuda.CUDAGraph:
        """Constants are brought to the device by an encoding before; a capture itself changes nothing."""
        for side, ring in enumerate(self.ring):
            mean = self.mean if side == 0 and self.quantizers[0].center else None
            self.quantizers[side].encode(ring[:, :, :, : self.storage.flush], mean)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._flush()
        return graph

    def keep(self, layers: list[Any], seen: int) -> None:
        for i, layer in enumerate(layers):
            exact = [(r[i, :, :, : self.sinks].clone(), r[i, :, :, self.sinks : self.dense].clone()) for r in self.ring]
            coded = layer.stored.coded
            if self.coded:
                mean = self.mean[i] if self.quantizers[0].center else None
                keys, values = (
                    PackedVectors(self.codes[s][i, :, :, : self.coded], self.scales[s][i, :, :, : self.coded], m)
                    for s, m in enumerate((mean, None))
                )
                coded = PackedPair(keys, values)
            first, recent = zip(*exact, strict=True)
            stored = WindowedTokens(self.storage, self.indices[i], tuple(first), coded, tuple(recent))
            layer.hold(stored, seen)
