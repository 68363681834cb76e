"""Models of published shapes with random weights, and caches of random rows: speed depends on nothing else."""

import numpy as np
import torch

from spectral_kv.backends.torch_cache import CompressedCache, CompressedLayer
from spectral_kv.backends.torch_runs import RunsLayer
from spectral_kv.quantization.turboquant import PackedVectors
from spectral_kv.storage.base import Stored
from spectral_kv.storage.dense import DenseTokens
from spectral_kv.storage.turboquant import PackedPair, TurboQuantStorage
from spectral_kv.storage.windowed import WindowedTokens

SHAPES = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "reference": {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


def model(name: str, device: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """A model of a published shape; its weights are random."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config, kind = (Qwen2Config, Qwen2ForCausalLM) if name.startswith("qwen") else (LlamaConfig, LlamaForCausalLM)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = kind(config(**SHAPES[name], max_position_embeddings=262144, rope_parameters=rope))
    finally:
        torch.set_default_dtype(before)
    return made.eval()


def _layer(made: torch.nn.Module, stored: Stored, seen: int) -> CompressedLayer:
    heads = (stored.keys if isinstance(stored, DenseTokens) else stored.recent[0]).shape[1]
    return CompressedLayer(stored, made.dtype, seen, np.zeros((heads, stored.tokens), dtype=int))  # read by nobody


def _cache(made: torch.nn.Module, stored: list, seen: int, batch: int) -> CompressedCache:
    return CompressedCache([_layer(made, s, seen) for s in stored], batch)


def dense_cache(made: torch.nn.Module, tokens: int, seen: int, batch: int) -> CompressedCache:
    """A cache of `tokens` random rows after `seen` tokens."""
    c = made.config
    shape = (batch, c.num_key_value_heads, tokens, c.hidden_size // c.num_attention_heads)

    def rows() -> torch.Tensor:
        return torch.randn(shape, device=made.device, dtype=made.dtype)

    return _cache(made, [DenseTokens(rows(), rows()) for _ in range(c.num_hidden_layers)], seen, batch)


def ragged_cache(made: torch.nn.Module, tokens: int, seen: int, batch: int) -> CompressedCache:
    """A cache of `tokens` random rows a KV head in the mean, from half to three halves of it, after `seen`."""
    c, layers = made.config, []
    heads, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    shares = np.linspace(0.5, 1.5, c.num_hidden_layers * heads)  # every head holds another number
    for each in np.random.default_rng(0).permutation(shares).reshape(-1, heads):
        shapes = [(batch, 1, round(share * tokens), dim) for share in each]
        rows = [torch.randn(2, *shape, device=made.device, dtype=made.dtype) for shape in shapes]
        layers.append(RunsLayer([_layer(made, DenseTokens(*pair), seen) for pair in rows]))
    return CompressedCache(layers, batch)


def coded_cache(made: torch.nn.Module, tokens: int, batch: int, bits: int) -> CompressedCache:
    """A cache of `tokens` rows, of which all but sinks and recent window are random codes."""
    c, storage = made.config, TurboQuantStorage(key_bits=bits, value_bits=bits)
    heads, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    coded = tokens - storage.sinks - storage.recent

    def exact(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(batch, heads, count, dim, device=made.device, dtype=made.dtype) for _ in range(2))

    def vectors(centred: bool) -> PackedVectors:
        codes = torch.randint(0, 256, (batch, heads, coded, dim * bits // 8), device=made.device, dtype=torch.uint8)
        scale = torch.rand(batch, heads, coded, device=made.device).half() + 0.5
        return PackedVectors(codes, scale, torch.randn(batch, heads, 1, dim, device=made.device).half() * centred)

    stored = []
    for index in range(c.num_hidden_layers):
        pair = PackedPair(vectors(True), vectors(False))
        stored.append(WindowedTokens(storage, index, exact(storage.sinks), pair, exact(storage.recent)))
    return _cache(made, stored, tokens, batch)


def weight_bytes(made: torch.nn.Module) -> int:
    """Bytes of weights that a step reads: all but an embedding that is not the head, of which it reads a row."""
    embedding = made.get_input_embeddings().weight
    total = sum(p.nbytes for p in made.parameters())
    return total if made.lm_head.weight is embedding else total - embedding.nbytes
