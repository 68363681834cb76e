"""Spectral scores of a shape that comes again as one captured graph: then a host does next to nothing for them.

Keys of a prompt lie anywhere; a graph finds them by their addresses, which are its only input.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from spectral_kv.engine.scoring import addresses

GRAPHS = 4  # that are kept
LARGEST = 2**25  # bytes of scores: with more of them a device is busy far longer than its host
SEEN = 64  # shapes that are remembered

_graphs: OrderedDict[Hashable, "Captured"] = OrderedDict()
_seen: OrderedDict[Hashable, None] = OrderedDict()
_lock = threading.Lock()


class Captured:
    """A function of the addresses of keys, captured.

    Parameters
    ----------
    scored : callable
        From addresses on the device to scores.
    keys : list of torch.Tensor
        Some to run it on.
    alive : list
        What the graph reads and nobody else may hold.
    """

    def __init__(self, scored: Callable[[torch.Tensor], torch.Tensor], keys: list[torch.Tensor], alive: list):
        self.alive, self.where = alive, addresses(keys)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            scored(self.where)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.out = scored(self.where)

    def __call__(self, keys: list[torch.Tensor]) -> torch.Tensor:
        self.where.copy_(torch.tensor([k.data_ptr() for k in keys]), non_blocking=True)
        self.graph.replay()
        return self.out.clone()


def scores(
    key: Hashable, scored: Callable[[torch.Tensor], torch.Tensor], keys: list[torch.Tensor], alive: Callable[[], list]
) -> torch.Tensor:
    """`scored` of where keys lie `[kv_heads, tokens, dim]`, from the second time on by replaying a graph.

    `key` is all that it depends on beside keys and their shape. Nobody else uses the graph on another stream.
    """
    rows, tokens = len(keys) * keys[0].shape[0], keys[0].shape[1]
    if 4 * rows * tokens > LARGEST or torch.cuda.is_current_stream_capturing():
        return scored(addresses(keys))
    stream = torch.cuda.current_stream(keys[0].device).cuda_stream
    key = (key, len(keys), keys[0].shape, keys[0].dtype, keys[0].device, stream)
    with _lock:
        if key in _graphs:
            _graphs.move_to_end(key)
            return _graphs[key](keys)
        if key not in _seen:
            _seen[key] = None
            while len(_seen) > SEEN:
                _seen.popitem(last=False)
            return scored(addresses(keys))
        while len(_graphs) >= GRAPHS:
            _graphs.popitem(last=False)
        _graphs[key] = Captured(scored, keys, alive())
        return _graphs[key](keys)
