"""What is done for a shape that comes again, as one captured graph: then a host does next to nothing for it.

Keys and values of a prompt lie anywhere; a graph finds them by their addresses, which are its input.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from spectral_kv.engine.scoring import addresses, on_host

GRAPHS = 8  # that are kept
LARGEST = 2**25  # bytes of results: with more of them a device is busy far longer than its host
SEEN = 64  # shapes that are remembered

_graphs: OrderedDict[Hashable, Callable] = OrderedDict()
_seen: OrderedDict[Hashable, None] = OrderedDict()
_lock = threading.Lock()


def replayed(key: Hashable, where: torch.Tensor, capture: Callable[[], Callable], *arguments: Any) -> Any:
    """What a captured function returns of arguments; None at the first call, for a shape that never comes again.

    `key` is all that the graph depends on beside the device and stream of `where`. Nobody else uses it on another one.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    key = (key, where.device, torch.cuda.current_stream(where.device).cuda_stream)
    with _lock, torch.inference_mode():  # buffers that a graph reads are written in the mode that made them
        if key not in _graphs:
            if key not in _seen:
                _seen[key] = None
                while len(_seen) > SEEN:
                    _seen.popitem(last=False)
                return None
            while len(_graphs) >= GRAPHS:
                _graphs.popitem(last=False)
            _graphs[key] = capture()
        _graphs.move_to_end(key)
        return _graphs[key](*arguments)


def graph(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what a function does, and what the function returned: the graph writes there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        out = run()
    return captured, out


class Scored:
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
        self.graph, self.out = graph(lambda: scored(self.where))

    def __call__(self, keys: list[torch.Tensor]) -> torch.Tensor:
        self.where.copy_(on_host(keys), non_blocking=True)
        self.graph.replay()
        return self.out.clone()


@dataclass(frozen=True)
class Pass:
    """Scores of all layers by kernels that find keys `[kv_heads, tokens, dim]` by their addresses.

    Parameters
    ----------
    key : hashable
        All that it depends on beside keys and their shape.
    scored : callable
        From addresses on the device to scores.
    constants : callable
        What the kernels read beside keys.
    """

    key: Hashable
    scored: Callable[[torch.Tensor], torch.Tensor]
    constants: Callable[[], list]


def scores(of: Pass, keys: list[torch.Tensor]) -> torch.Tensor:
    """Scores of keys, from the second time on that their shape comes by replaying a graph."""
    heads, tokens = keys[0].shape[:2]
    if 4 * len(keys) * heads * tokens <= LARGEST:
        shape = ("scores", of.key, len(keys), keys[0].shape, keys[0].dtype)
        found = replayed(shape, keys[0], lambda: Scored(of.scored, keys, of.constants()), keys)
        if found is not None:
            return found
    return of.scored(addresses(keys))
