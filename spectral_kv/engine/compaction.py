"""Which tokens scores say to keep, and their keys and values, of all layers in one captured graph; scores, too."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from spectral_kv.engine import captured
from spectral_kv.engine.scoring import addresses, on_host, select_into, suits, take_into
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
    """Scores, selection and kept rows, captured for keys and values `[kv_heads, tokens, dim]` of one shape.

    Parameters
    ----------
    scores : torch.Tensor, [layers, kv_heads, tokens], or captured.Pass
        Some, if every call brings scores of its own; or what computes them from keys, as a part of the graph.
    keys, values : list of torch.Tensor
        Some to run it on.
    span : slice
        The tokens that may be evicted.
    quota : int
        How many of them every head keeps.
    """

    def __init__(self, scores: torch.Tensor | captured.Pass, keys: list, values: list, span: slice, quota: int):
        layers, (heads, tokens, dim) = len(keys), keys[0].shape
        count = quota + tokens - (span.stop - span.start)
        self.shape, self.rows = (layers, heads, count), layers * heads
        self.make = partial(keys[0].new_empty, 2 * layers, 1, heads, count, dim)
        first = self.make()  # the graph writes where it is told to
        self.where = addresses([*keys, *values, first])
        if isinstance(scores, captured.Pass):
            self.alive, scored = scores.constants(), scores.scored
        else:
            self.scores = scores.float().contiguous().clone()

            def scored(where: torch.Tensor) -> torch.Tensor:
                return self.scores

        def run() -> tuple[torch.Tensor]:
            found = torch.empty(self.rows * (count + 1), dtype=torch.int64, device=keys[0].device)
            kept, bad = found[: self.rows * count], found[self.rows * count :]
            select_into(scored(self.where).view(self.rows, tokens), span, quota, kept, bad)
            take_into(self.where, keys[0], layers, kept)
            return (found,)

        self.graph, (self.found,) = captured.graph(run)

    def __call__(self, scores: torch.Tensor | captured.Pass, keys: list, values: list) -> Kept:
        if not isinstance(scores, captured.Pass):
            self.scores.copy_(scores)
        taken = self.make()
        self.where.copy_(on_host([*keys, *values, taken]), non_blocking=True)
        self.graph.replay()
        host = torch.empty(self.found.shape, dtype=torch.int64, pin_memory=self.found.is_cuda)
        host.copy_(self.found, non_blocking=True)  # it comes while the host goes on
        kept, rows = self.found[: -self.rows].clone(), taken.unbind()
        layers, answer = len(keys), host.numpy()
        stream = torch.cuda.current_stream(self.found.device) if self.found.is_cuda else None
        positions = answer[: -self.rows].reshape(self.shape)
        return Kept(kept.view(self.shape), rows[:layers], rows[layers:], positions, answer[-self.rows :], stream)


def kept(scores: torch.Tensor | captured.Pass, keys: list, values: list, budget: Budget) -> Kept | None:
    """What scores on a GPU `[layers, kv_heads, tokens]` say to keep of keys and values `[kv_heads, tokens, dim]`.

    A `captured.Pass` has them computed by the same graph. None where there is nothing to choose, where KV heads don't
    choose for themselves as many as one another, and where no graph serves: for large results, layouts that no kernel
    reads, and a shape that comes for the first time.
    """
    layers, (heads, tokens, dim), kind = len(keys), keys[0].shape, keys[0].dtype
    if budget.tokens >= tokens or not budget.by_head:
        return None
    size = layers * heads * (4 * tokens + 2 * budget.tokens * dim * kind.itemsize)
    if size > captured.LARGEST or not suits([*keys, *values]) or values[0].shape != keys[0].shape:
        return None
    span, quota = budget.evictable(tokens), budget.tokens - budget.sinks - budget.recent
    own = scores.key if isinstance(scores, captured.Pass) else None
    key = ("kept", own, layers, keys[0].shape, kind, span.start, span.stop, quota)

    def capture() -> Compaction:
        return Compaction(scores, keys, values, span, quota)

    return captured.replayed(key, keys[0], capture, scores, keys, values)
