"""A decoding step: a token a sequence in, the most likely next token out, with nothing on the host but its start."""

import time
from collections.abc import Callable

import torch

from spectral_kv.engine.rows import Rows

Forward = Callable[[torch.Tensor, torch.Tensor, list[Rows]], torch.Tensor]


class Counters:
    """What a step advances, on the device: one addition counts everything.

    Parameters
    ----------
    layers, batch, kv_heads : int

    Attributes
    ----------
    position : int64 [1]
        Logical position of the token that is fed.
    said : int64 [1]
        Number of tokens generated.
    lengths : int64 [layers, batch, kv_heads]
        Dense rows of every head.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, device: torch.device):
        self.all = torch.zeros(2 + layers * batch * kv_heads, dtype=torch.int64, device=device)
        self.position, self.said = self.all[:1], self.all[1:2]
        self.lengths = self.all[2:].view(layers, batch, kv_heads)

    @torch.inference_mode()
    def start(self, position: int, lengths: torch.Tensor | int) -> None:
        self.position.fill_(position)
        self.said.zero_()
        if isinstance(lengths, int):
            self.lengths.fill_(lengths)
        else:
            self.lengths.copy_(lengths)


class Step:
    """One forward pass and the choice of the next token, over fixed buffers; on a GPU captured once and replayed.

    Parameters
    ----------
    forward : callable
        From ids `[batch, 1]`, position `[1]` and rows to logits `[batch, vocabulary]`.
    rows : list of Rows, one a layer
    counters : Counters
        Whose `lengths` the rows read.
    batch : int
    room : int
        Most tokens of one call of `generate`.
    captured : bool
        Whether the step is captured in a CUDA graph; without, the same code runs eagerly on any device.
    """

    def __init__(self, forward: Forward, rows: list[Rows], counters: Counters, batch: int, room: int, captured: bool):
        device = counters.all.device
        self.forward, self.rows, self.counters, self.batch, self.room = forward, rows, counters, batch, room
        self.captured, self.capture_seconds = captured, 0.0
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.generated = torch.zeros(room, batch, dtype=torch.int64, device=device)
        self.logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()

    def _run(self) -> None:
        self.logits = self.forward(self.ids, self.counters.position, self.rows)
        following = self.logits.argmax(-1)
        self.ids.copy_(following[:, None])
        self.generated.index_copy_(0, self.counters.said, following[None])
        self.counters.all.add_(1)

    @torch.inference_mode()
    def _capture(self) -> None:
        """Kernels and handles are made by a run before; it writes where the first step will write again."""
        start = time.perf_counter()
        before = self.counters.all.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.counters.all.copy_(before)
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.counters.all.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self.counters.all.copy_(before)
        self._graph = graph
        torch.cuda.synchronize()
        self.capture_seconds = time.perf_counter() - start

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        """Feed the ids that are there; logits `[batch, vocabulary]`, which the next run overwrites."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self.logits
