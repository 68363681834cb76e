"""Which tokens scores say to keep, and their keys and values, of all layers in one captured graph."""

from dataclasses import dataclass

import numpy as np
import torch

from spectral_kv.engine import captured
from spectral_kv.engine.scoring import addresses, select_into, suits, take_into
from spectral_kv.selection import Budget, not_numbers


@dataclass(frozen=True)
class Kept:
    """Kept tokens of all layers.

    Parameters
    ----------
    tokens : torch.Tensor, [layers, kv_heads, kept]
    keys, values : tuple of torch.Tensor, [1, kv_heads, kept, dim], one a layer
    positions : np.ndarray, [layers, kv_heads, kept]
        The same tokens in the host's memory, when `wait` has returned.
    """

    tokens: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    positions: np.ndarray
    _bad: np.ndarray
    _stream: torch.cuda.Stream | None

    def wait(self) -> None:
        """For the device; raises if a score that decided was not a number."""
        if self._stream is not None:
            self._stream.synchronize()
        if self._bad.any():
            raise not_numbers()


class Compaction:
    """Selection and kept rows, captured for scores `[layers, kv_heads, tokens]` and keys and values of their shape."""

    def __init__(self, scores: torch.Tensor, keys: list, values: list, span: slice, quota: int):
        layers, heads, tokens = scores.shape
        count = quota + tokens - (span.stop - span.start)
        self.shape, self.rows = (layers, heads, count), layers * heads
        self.scores, self.where = scores.float().contiguous().clone(), addresses([*keys, *values])
        like = {"dtype": keys[0].dtype, "device": scores.device}

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            found = torch.empty(self.rows * (count + 1), dtype=torch.int64, device=scores.device)
            kept, bad = found[: self.rows * count], found[self.rows * count :]
            select_into(self.scores.view(self.rows, tokens), span, quota, kept, bad)
            taken = torch.empty(2 * layers, 1, heads, count, keys[0].shape[-1], **like)
            take_into(self.where, keys[0], layers, kept, taken)
            return found, taken

        self.graph, (self.found, self.taken) = captured.graph(run)

    def __call__(self, scores: torch.Tensor, keys: list, values: list) -> Kept:
        self.scores.copy_(scores)
        self.where.copy_(torch.tensor([x.data_ptr() for x in (*keys, *values)]), non_blocking=True)
        self.graph.replay()
        host = torch.empty(self.found.shape, dtype=torch.int64, pin_memory=scores.is_cuda)
        host.copy_(self.found, non_blocking=True)  # it comes while the host goes on
        kept, rows = self.found[: -self.rows].clone(), self.taken.clone().unbind()
        layers, answer = len(keys), host.numpy()
        stream = torch.cuda.current_stream(scores.device) if scores.is_cuda else None
        positions = answer[: -self.rows].reshape(self.shape)
        return Kept(kept.view(self.shape), rows[:layers], rows[layers:], positions, answer[-self.rows :], stream)


def kept(scores: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], budget: Budget) -> Kept | None:
    """What scores on a GPU `[layers, kv_heads, tokens]` say to keep of keys and values `[kv_heads, tokens, dim]`.

    None where there is nothing to choose, where KV heads don't choose for themselves as many as one another, and where
    no graph serves: for large results, layouts that no kernel reads, and a shape that comes for the first time.
    """
    layers, heads, tokens = scores.shape
    if budget.tokens >= tokens or budget.allocation != "uniform" or budget.selection != "per_layer_perhead":
        return None
    dim, kind = keys[0].shape[-1], keys[0].dtype
    size = layers * heads * (4 * tokens + 2 * budget.tokens * dim * kind.itemsize)
    if size > captured.LARGEST or not (suits(keys) and suits(values)) or values[0].shape != keys[0].shape:
        return None
    span, quota = budget.evictable(tokens), budget.tokens - budget.sinks - budget.recent
    key = ("kept", layers, keys[0].shape, kind, span.start, span.stop, quota)
    return captured.replayed(key, scores, lambda: Compaction(scores, keys, values, span, quota), scores, keys, values)
