"""A cache layer whose KV heads hold different numbers of tokens, or tokens with a bias."""

from contextvars import ContextVar

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from spectral_kv.backends.torch_cache import CompressedLayer
from spectral_kv.backends.unplanned import unplanned
from spectral_kv.heads import Heads, of_queries, runs
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import rows, to_numpy

# The layer that was fed, until the attention over it is computed.
read: ContextVar["RunsLayer | None"] = ContextVar("read", default=None)


def split(layer: CompressedLayer, kept: Heads, batch: int) -> "RunsLayer":
    """A layer of the rows `kept` of one whose KV heads hold equally many.

    Rows that stay in one run keep their codes; those of heads that part are coded again.
    """
    if not isinstance(kept, list):
        return RunsLayer([layer]).take([kept], batch)
    storage, (keys, values) = getattr(layer.stored, "storage", Dense()), layer.stored.load()
    made = []
    for heads, (chosen,) in runs(kept):
        own = chosen.expand(batch, *chosen.shape)
        stored = storage.store(*(rows(x[:, heads], own) for x in (keys, values)), getattr(layer.stored, "layer", 0))
        positions = np.take_along_axis(layer.positions[heads], to_numpy(chosen), axis=1)
        made.append(CompressedLayer(stored, layer.cache_dtype, layer.seen, positions))
    return RunsLayer(made)


class RunsLayer(CacheLayerMixin):
    """Stored tokens of one layer in runs of KV heads that hold equally many, each in memory of its own.

    A model makes one mask for all layers, from the length of the first; here every layer and run has its own, so that
    attention is computed by `attend`. The model hands it the new tokens alone.

    Parameters
    ----------
    runs : list of CompressedLayer
        Of the KV heads in their order, one or several a run.
    bias : list of torch.Tensor, [heads of the run, held], one a run, optional
        What is added to the logits of the tokens that are there; those fed later have none.
    """

    is_sliding = False

    def __init__(self, runs: list[CompressedLayer], bias: list[torch.Tensor] | None = None):
        super().__init__()
        self.runs, self.bias = runs, bias
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing waits to be made."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Add new tokens `[batch, kv_heads, new, dim]`; keys and values of every run with them."""
        parts = zip(*(x.split(self.heads, dim=1) for x in (keys, values)), strict=True)
        return [run.update(*pair) for run, pair in zip(self.runs, parts, strict=True)]

    def update(self, key_states, value_states, *args, **kwargs):
        if read.get() is not None:
            read.set(None)
            raise RuntimeError("the model does not attend by way of spectral_kv, which this cache needs")
        self._held = self.append(key_states, value_states)
        read.set(self)
        return key_states, value_states

    def attend(self, queries: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Outputs `[batch, tokens, query_heads, dim]` of queries `[batch, query_heads, tokens, dim]` just fed."""
        outputs, start, kv_heads, new = [], 0, sum(self.heads), queries.shape[2]
        with unplanned():
            for index, (count, (keys, values)) in enumerate(zip(self.heads, self._held, strict=True)):
                own = of_queries(queries.transpose(0, 1), slice(start, start + count), kv_heads).transpose(0, 1)
                together = own.reshape(len(own), count, -1, own.shape[-1])  # query heads of a group are tokens of it
                mask = self._mask(index, new, keys.shape[2], own)
                attended = scaled_dot_product_attention(together, keys, values, mask, scale=scaling)
                outputs.append(attended.reshape(own.shape))
                start += count
        self._held = []
        return torch.cat(outputs, dim=1).transpose(1, 2).contiguous()

    def _mask(self, index: int, new: int, rows: int, queries: torch.Tensor) -> torch.Tensor | None:
        """What the `new` tokens of all query heads of a group see of the `rows` of a run, and the bias of those."""
        mask, group = None, queries.shape[1] // self.heads[index]
        if new > 1:
            mask = torch.ones(new, rows, dtype=torch.bool, device=queries.device).tril(rows - new).repeat(group, 1)
        if self.bias is None:
            return mask
        bias = pad(self.bias[index], (0, rows - self.bias[index].shape[-1])).to(queries.dtype)
        bias = bias[:, None].expand(-1, group * new, -1)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    @property
    def heads(self) -> list[int]:
        """KV heads of every run."""
        return [run.kv_heads for run in self.runs]

    @property
    def held(self) -> int:
        """Rows of the longest run."""
        return max(run.held for run in self.runs)

    @property
    def seen(self) -> int:
        """Logical position of the next token."""
        return self.runs[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that must live to continue decoding."""
        return sum(x.nbytes for x in (*self.runs, *(self.bias or [])))

    @property
    def allocated(self) -> int:
        """Bytes that the allocator holds for the layer, room to grow included."""
        return sum(run.allocated for run in self.runs) + sum(x.nbytes for x in self.bias or [])

    def reserve(self, tokens: int) -> None:
        """Make room for so many dense tokens more, where there is less."""
        for run in self.runs:
            run.reserve(tokens)

    def contents(self) -> tuple[list, list, list, list | None]:
        """Keys, values, positions and bias of the first sequence, `[heads of the run, held, ...]`, one a run."""
        loaded = [[x[0] for x in run.stored.load()] for run in self.runs]
        bias = self.bias and [pad(b, (0, run.held - b.shape[-1])) for b, run in zip(self.bias, self.runs, strict=True)]
        return [k for k, _ in loaded], [v for _, v in loaded], [run.positions for run in self.runs], bias

    def take(self, kept: list[torch.Tensor], batch: int) -> "RunsLayer":
        """With the rows `[heads of the run, kept]` alone, one array a run."""
        bias = self.contents()[3]
        runs = []
        for run, chosen in zip(self.runs, kept, strict=True):
            positions = np.take_along_axis(run.positions, to_numpy(chosen), axis=1)
            stored = run.stored.take(chosen.expand(batch, *chosen.shape))
            runs.append(CompressedLayer(stored, run.cache_dtype, run.seen, positions))
        return RunsLayer(runs, bias and [b.gather(-1, chosen) for b, chosen in zip(bias, kept, strict=True)])

    def get_seq_length(self) -> int:
        """Tokens seen: where the next one goes."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of a mask that nobody reads."""
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        return -1

    def copy(self) -> "RunsLayer":
        """A layer that can be extended without touching this one."""
        return RunsLayer([run.copy() for run in self.runs], self.bias)
