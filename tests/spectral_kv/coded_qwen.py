"""A small Qwen2 with bases in its folder, and random text for it."""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import spectral_kv


def text(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 512, (batch, tokens)))


def qwen(folder: Path, layers: int) -> Qwen2ForCausalLM:
    """With 2 KV heads of 16; layers are coded in groups of two."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, initializer_range=0.2, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config).eval()
    made.config._name_or_path = str(folder)
    found = spectral_kv.bases(made, [text(400, seed)[0].numpy() for seed in range(3)], layers=2)
    found.save(folder / "bases.safetensors")
    return made
