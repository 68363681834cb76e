"""Heads that hold different numbers of rows, in buffers with room to grow."""

from collections.abc import Iterator
from typing import Any

import torch

from spectral_kv.engine.held import Held, viewers
from spectral_kv.engine.rows import DenseRows
from spectral_kv.storage.dense import DenseTokens


class HeldRuns(Held):
    """Dense keys and values of layers in runs of KV heads; a layer has room for the longest of its heads.

    `capacity` is that of the layer that holds most; all have room for as many rows to come.
    """

    @staticmethod
    def _exact(layers: list[Any]) -> torch.Tensor:
        keys = layers[0].runs[0].stored.keys
        return keys[:, :1].expand(-1, sum(layers[0].heads), -1, -1)

    @staticmethod
    def _where(layers: list[Any]) -> int:
        return layers[0].runs[0].stored.keys.data_ptr()

    def _description(self, layers: list[Any]) -> tuple:
        shape = self._exact(layers).shape
        return (*shape[:2], shape[-1], layers[0].runs[0].stored.keys.dtype)

    def suits(self, layers: list[Any], count: int) -> bool:
        return super().suits(layers, count) and all(
            layer.held + count <= row.keys.shape[-2] for layer, row in zip(layers, self.rows, strict=True)
        )

    def _rows(self, layers: list[Any]) -> list[DenseRows]:
        """One layer after the other gives up what it had: no more than one of them lives twice."""
        rows, self._alone = [], []
        like, room = self._exact(layers), self.capacity - max(layer.held for layer in layers)
        for index, layer in enumerate(layers):
            keys, values = (like.new_empty((*like.shape[:2], layer.held + room, like.shape[-1])) for _ in range(2))
            self._alone += [viewers(keys), viewers(values)]
            rows.append(DenseRows(keys, values, self.counters.lengths[index], self.query_heads))
            _fill(layer, rows[-1])
            _hand(layer, rows[-1], layer.seen)
        return rows

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [x for row in self.rows for x in (row.keys, row.values)]

    def load(self, layers: list[Any]) -> None:
        held = [[run.held for run in layer.runs for _ in range(run.kv_heads)] for layer in layers]
        self.dense = torch.tensor(held)[:, None].repeat(1, self.batch, 1)
        self._views = [len(layer.runs) for layer in layers for _ in range(2)]  # tensors of one cache into each buffer
        for layer, row in zip(layers, self.rows, strict=True):
            _fill(layer, row)

    def make_room(self) -> None: ...

    def keep(self, layers: list[Any], seen: int) -> None:
        for layer, row in zip(layers, self.rows, strict=True):
            _hand(layer, row, seen)


def _parts(layer: Any, row: DenseRows) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Every run of a layer, and what its heads have of the buffers."""
    parts = (x.split(layer.heads, dim=1) for x in (row.keys, row.values))
    return zip(layer.runs, *parts, strict=True)


def _fill(layer: Any, row: DenseRows) -> None:
    """Copy what a layer holds into the buffers, where it is not there."""
    for run, keys, values in _parts(layer, row):
        if run.stored.keys.data_ptr() != keys.data_ptr():
            keys[:, :, : run.held] = run.stored.keys
            values[:, :, : run.held] = run.stored.values


def _hand(layer: Any, row: DenseRows, seen: int) -> None:
    """Have a layer hold its rows in the buffers, after `seen` tokens in all."""
    for run, keys, values in _parts(layer, row):
        rows = run.held + seen - run.seen
        run.hold(DenseTokens(keys[:, :, :rows], values[:, :, :rows]), seen)
