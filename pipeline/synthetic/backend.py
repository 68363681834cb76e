"""The backend of a model without weights: torch caches and storages around keys, values and queries of its making."""

import numpy as np
import torch

from pipeline.synthetic.model import TOPICS, SyntheticModel
from spectral_kv.backends.base import Extension, Prefill, Reread, Watch
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.backends.torch_cache import CompressedCache


class SyntheticBackend(TorchBackend):
    """Everything that comes after the forward pass is the torch backend's; nothing is predicted, so logits are empty.

    Parameters
    ----------
    model : SyntheticModel
        It makes up what a forward pass would have computed.
    device, dtype, cache_dtype : str
        As for the torch backend; `dtype` is that of the queries.
    """

    def __init__(self, model: SyntheticModel, device: str = "auto", dtype: str = "auto", cache_dtype: str = "bfloat16"):
        self._settle(device, dtype, cache_dtype)
        self.model, self.shape, self.rope, self.scaling = model, model.shape, model.rope, model.scaling

    def _tensor(self, x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(x, device=self.device)

    def planted(self, tokens: np.ndarray) -> np.ndarray:
        """Ascending positions `[planted]` of the planted tokens of a prompt."""
        return self.model.planted_tokens(tokens)[0]

    def _queries(self, tokens: np.ndarray, start: int, topics: list[int]) -> list[torch.Tensor]:
        """Rotated queries `[query_heads, tokens, dim]`, one a layer, of tokens that follow one another from `start`."""
        positions = np.arange(start, start + len(tokens))
        made = self._tensor(self.model.queries(tokens, positions, topics))
        return [self.rope.rotate(x, positions).to(self.dtype) for x in made]

    def prefill(
        self, tokens: np.ndarray, observe: int, chunk: int | None = None, watch: Watch | None = None
    ) -> Prefill:
        """Nothing runs, so there is nothing to do in pieces and nothing to watch but all queries at once."""
        tokens = np.asarray(tokens)
        positions, layers = np.arange(len(tokens)), range(self.shape.layers)
        keys = (self.rope.rotate(self._tensor(self.model.keys(tokens, layer)), positions) for layer in layers)
        values = (self._tensor(self.model.values(tokens, layer)) for layer in layers)
        keys, values = ([x.to(self.cache_dtype) for x in arrays] for arrays in (keys, values))
        start = len(tokens) - observe
        if watch is not None:
            for layer, queries in enumerate(self._queries(tokens, 0, [self.model.asked(tokens)])):
                watch(layer, queries, keys[layer], values[layer])
        return Prefill(
            tokens,
            keys,
            values,
            self._queries(tokens[start:], start, [self.model.asked(tokens)]),
            torch.empty(0, device=self.device),
        )

    def extend(self, cache: CompressedCache, tokens: np.ndarray) -> Extension:
        """Queries that look for every topic. Keys and values of the fed tokens are 0: no metric looks at them."""
        queries = self._queries(tokens, cache.position, list(range(TOPICS)))
        self.grow(cache, len(tokens))
        return Extension(torch.empty(0, device=self.device), queries)

    def project(self, layer: int, outputs: torch.Tensor) -> None:
        """There is no W_O."""

    def output_weights(self, layer: int) -> None:
        """There is no W_O."""

    def query_bias(self, layer: int) -> None:
        """There is no W_Q."""

    def reread(self, prefill: Prefill, tokens: np.ndarray, watch: Reread) -> None:
        raise NotImplementedError("a model without weights repeats no prompt")

    def generate(self, cache: CompressedCache, token: int, count: int) -> list[int]:
        raise NotImplementedError("a model without weights predicts no tokens")
