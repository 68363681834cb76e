"""Which step decodes a cache, and why not a faster one."""

import logging
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from spectral_kv.engine.forward import Blocks, Modules
from spectral_kv.engine.held import Held, HeldCoded, HeldDense
from spectral_kv.engine.held_runs import HeldRuns
from spectral_kv.engine.lookup import PARTS
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.turboquant import TurboQuantStorage
from spectral_kv.storage.windowed import WindowedTokens

ENGINES = ("auto", "eager", "graph")
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative error of logits
FED = 16  # tokens on which joined blocks are compared with the modules
ROUND = 256  # rows
WIDEST = 256  # channels of a head of which a multiprocessor's shared memory holds the tiles

log = logging.getLogger(__name__)


_engines: WeakKeyDictionary[torch.nn.Module, WeakValueDictionary[str, "Engine"]] = WeakKeyDictionary()


def engine_of(model: torch.nn.Module, kind: str) -> "Engine":
    """The engine of a kind that somebody uses for the model already, with all that it captured, or a new one."""
    engines = _engines.setdefault(model, WeakValueDictionary())
    found = engines.get(kind)
    if found is None or (found.device, found.dtype) != (model.device, model.dtype):
        found = engines[kind] = Engine(model, kind)
    return found


class Engine:
    """Decodes caches of one model by steps over fixed buffers.

    On CUDA a step is captured in a graph and replayed: by the model's own modules, or, where a model is built like
    Llama or Qwen2, by compiled blocks with joined projections, after they gave the same logits once. On a CPU the
    step reads TurboQuant codes without decoding them first.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    kind : str
        `auto`; `eager` for none of it; `graph` to refuse where no graph can be captured.
    blocks : bool
        Whether blocks are joined and compiled where they can be.
    """

    def __init__(self, model: torch.nn.Module, kind: str = "auto", blocks: bool = True):
        if kind not in ENGINES:
            raise ValueError(f"engine={kind} is not known: choose one of {', '.join(ENGINES)}")
        self.model, self.kind, self.blocks = model, kind, blocks
        self.device, self.dtype = model.device, model.dtype
        self._devices = sorted({str(p.device) for p in model.parameters()})
        if kind == "graph" and (missing := self._no_graph()):
            raise ValueError(f"engine=graph can't be had: {missing}; set engine=auto")
        self._modules: Modules | None = None
        self._joined: Blocks | None = None
        self._held: list[Held] = []

    def _no_graph(self) -> str | None:
        if self.device.type != "cuda":
            return f"the model is on {self.device.type}, and graphs need a CUDA GPU"
        if len(self._devices) > 1:
            return f"the model is spread over {', '.join(self._devices)}, and a graph is of one GPU"
        if find_spec("triton") is None:
            return "Triton is not installed"
        return None

    def reason(self, layers: list[Any]) -> str | None:
        """Why the layers of a cache are decoded by the model's eager forward pass, or None if a step decodes them."""
        if hasattr(layers[0], "sequences"):
            return "transformers' generate feeds it by forward passes of the model; cache.greedy takes steps"
        apart = hasattr(layers[0], "runs")
        if apart and layers[0].bias is not None:
            return "its tokens have a bias"
        stored = layers[0].runs[0].stored if apart else layers[0].stored
        if self.kind == "eager":
            return "engine=eager"
        coded = isinstance(stored, WindowedTokens) and isinstance(stored.storage, TurboQuantStorage)
        if apart and not isinstance(stored, DenseTokens):
            return "its heads hold different numbers of tokens, and not as they are"
        if not coded and not isinstance(stored, DenseTokens):
            return f"{type(getattr(stored, 'storage', stored)).__name__} has no kernel"
        if coded and stored.storage.recent == 0:
            return "a recent window of 0 tokens leaves no room for the token that is fed"
        exact = stored.recent[0] if coded else stored.keys
        if unknown := {self.dtype, exact.dtype} - set(AGREEMENT):
            return f"{unknown.pop()} has no kernel"
        dim = exact.shape[-1]
        least = 16  # channels of a matrix product, of which codes give a part at a time
        if coded:
            least *= max(PARTS[bits] for bits in (stored.storage.key_bits, stored.storage.value_bits))
        if self.device.type == "cuda" and (not least <= dim <= WIDEST or dim & (dim - 1)):
            return f"a head dimension of {dim} is not a power of two from {least} to {WIDEST}"
        missing = self._no_graph()
        return None if coded and self.device.type == "cpu" else missing

    def generate(self, layers: list[Any], ids: torch.Tensor, count: int) -> torch.Tensor:
        """Feed `ids` `[batch]` to the layers of a cache and decode greedily: tokens `[count, batch]`.

        The layers grow by them.
        """
        return self.held(layers, count).generate(layers, ids, count)

    @torch.inference_mode()
    def ready(self, layers: list[Any], count: int) -> None:
        """Bring the layers of a cache into buffers with room for `count` tokens, and capture what will be replayed."""
        held = self.held(layers, count)
        held.load(layers)
        held.keep(layers, layers[0].seen)

    @torch.inference_mode()
    def held(self, layers: list[Any], count: int) -> Held:
        """Buffers for the layers and `count` rows more: those that they are in alone, free ones that fit, new ones."""
        if hasattr(layers[0], "runs"):
            kind = HeldRuns
        else:
            kind = HeldDense if isinstance(layers[0].stored, DenseTokens) else HeldCoded
        count = max(count, 1)  # a capture writes a row
        needed = max(layer.held for layer in layers) + count
        for held in self._held:
            fits = needed <= held.capacity <= needed + needed // 4 + 2 * ROUND
            if type(held) is kind and fits and held.suits(layers, count) and (held.free or held.is_of(layers)):
                return held
        self._held = [held for held in self._held if not held.free]
        capacity = -(-needed // ROUND) * ROUND
        captured = self.device.type == "cuda"
        held = kind(layers, self.model.config.num_attention_heads, capacity, self.forward(), self.dtype, captured)
        self._held.append(held)
        return held

    def release(self) -> None:
        """Forget buffers and graphs."""
        self._held = []

    def forward(self) -> Modules | Blocks:
        """The fastest way through the model that gives its logits."""
        if self._modules is None:
            self._modules = Modules(self.model)
            if self.blocks and self.device.type == "cuda":
                self._joined = self._verified()
        return self._joined or self._modules

    def _verified(self) -> Blocks | None:
        """Joined blocks, if the model has them and they say what its modules say."""
        try:
            blocks = Blocks(self.model)
            error = self._difference(blocks)
        except Exception as problem:
            log.warning("decoding by the model's own modules: %s", problem)
            return None
        if not error < AGREEMENT[self.dtype]:
            log.warning("decoding by the model's own modules: joined blocks differ from them by %.3g", error)
            return None
        return blocks

    @torch.inference_mode()
    def _difference(self, blocks: Blocks) -> float:
        """Relative difference of logits, the median over a few random tokens that are fed one after another.

        Rows are the model's own. Random ones are like nothing a trained model has seen, and in 16 bits its logits then
        hang on the last bit: those of SmolLM2's own modules are 0.63 off those in float32.
        """
        from spectral_kv.engine.rows import DenseRows

        config, generator = self.model.config, torch.Generator(self.device).manual_seed(0)
        attention = self.model.base_model.layers[0].self_attn
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        lengths = torch.zeros(1, heads, dtype=torch.int64, device=self.device)
        empty = torch.zeros(1, heads, FED, attention.head_dim, device=self.device, dtype=self.dtype)
        rows = [
            DenseRows(empty.clone(), empty.clone(), lengths, config.num_attention_heads)
            for _ in range(config.num_hidden_layers)
        ]
        errors = []
        for token in torch.randint(config.vocab_size, (FED, 1, 1), generator=generator, device=self.device):
            one, other = (forward(token, lengths[0, :1], rows).double() for forward in (self._modules, blocks))
            errors.append((one - other).norm() / one.norm())
            lengths.add_(1)
        return float(torch.stack(errors).median())
