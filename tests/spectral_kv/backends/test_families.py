"""Families of models, each a small random checkpoint: compression means the same on all of them.

A budget that holds the prompt changes no logit, evicting a set of tokens equals masking it, and un-rotated keys are
what the model had before its rotation.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from spectral_kv.backends.torch import TorchBackend
from spectral_kv.storage.dense import Dense

PROMPT, SIZE, KEPT = 90, 120, 30
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def configured(kind: type[PretrainedConfig], heads: int, kv_heads: int, dim: int, **more) -> PretrainedConfig:
    sizes = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    return kind(**sizes | more)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2": lambda: configured(Qwen2Config, 4, 2, 16),
    "qwen3, normed queries and keys": lambda: configured(Qwen3Config, 4, 2, 32),
    "llama 3, scaled rotation": lambda: configured(LlamaConfig, 4, 2, 16, rope_parameters=LLAMA3_ROPE),
    "mistral without a window": lambda: configured(MistralConfig, 4, 2, 16, sliding_window=None),
    "one KV head": lambda: configured(LlamaConfig, 4, 1, 16),
    "as many KV heads as query heads": lambda: configured(LlamaConfig, 3, 3, 16, hidden_size=48),
    "three query heads a KV head": lambda: configured(LlamaConfig, 9, 3, 64, hidden_size=72),
    "head dim 80": lambda: configured(LlamaConfig, 2, 1, 80),
    "head dim 96": lambda: configured(Qwen3Config, 2, 1, 96),
    "head dim 128": lambda: configured(Qwen2Config, 2, 2, 128),
    "outputs of their own": lambda: configured(Qwen3Config, 4, 2, 16, tie_word_embeddings=False),
    "biases": lambda: configured(LlamaConfig, 4, 2, 16, attention_bias=True, mlp_bias=True),
}


def saved(config: PretrainedConfig, folder) -> str:
    """A random checkpoint; norms and biases are random, too, so that leaving one out shows."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, weights in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weights, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES, ids=[name.replace(" ", "_") for name in FAMILIES])
def family(request, tmp_path_factory):
    """A backend, and the plain model in transformers."""
    folder = saved(FAMILIES[request.param](), tmp_path_factory.mktemp("family"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return TorchBackend(folder, device="cpu", dtype="float32", cache_dtype="float32"), plain


@pytest.fixture
def tokens(rng) -> np.ndarray:
    return rng.integers(3, 500, size=SIZE)


def sets(backend: TorchBackend, rng: np.random.Generator) -> list[torch.Tensor]:
    """Kept positions `[kv_heads, KEPT]` of every layer, other ones in every head."""
    return [
        torch.from_numpy(
            np.stack([np.sort(rng.choice(PROMPT, KEPT, replace=False)) for _ in range(backend.shape.kv_heads)])
        )
        for _ in range(backend.shape.layers)
    ]


@torch.inference_mode()
def masked(plain, tokens: np.ndarray, kept: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Logits of the plain model where the tokens after the prompt see only what was kept of it."""
    hooks = []
    for block, positions in zip(plain.model.layers, kept, strict=True):
        allowed = torch.ones(SIZE, SIZE, dtype=torch.bool).tril().repeat(heads, 1, 1)
        for head in range(heads):
            evicted = torch.ones(PROMPT, dtype=torch.bool)
            evicted[positions[head // (heads // len(positions))]] = False
            allowed[head, PROMPT:, :PROMPT] &= ~evicted
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[None]
        hooks.append(
            block.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        return plain(torch.from_numpy(tokens)[None]).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def test_the_shape_is_the_model_s(family):
    backend, plain = family
    config = plain.config
    assert (backend.shape.layers, backend.shape.query_heads) == (3, config.num_attention_heads)
    assert (backend.shape.kv_heads, backend.shape.dim) == (config.num_key_value_heads, config.head_dim)


@torch.inference_mode()
def test_a_budget_that_holds_the_prompt_is_the_plain_model(family, tokens):
    backend, plain = family
    prefill = backend.prefill(tokens[:PROMPT], observe=1)
    everything = [torch.arange(PROMPT).repeat(backend.shape.kv_heads, 1)] * backend.shape.layers
    full = backend.extend(backend.compress(prefill, None, Dense()), tokens[PROMPT:]).logits
    kept = backend.extend(backend.compress(prefill, everything, Dense()), tokens[PROMPT:]).logits
    assert torch.equal(kept, full)
    expected = plain(torch.from_numpy(tokens)[None]).logits[0]
    torch.testing.assert_close(full, expected[PROMPT:], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(prefill.logits, expected[PROMPT - 1], atol=2e-4, rtol=2e-4)


def test_evicting_a_set_equals_masking_it(family, tokens, rng):
    backend, plain = family
    kept = sets(backend, rng)
    prefill = backend.prefill(tokens[:PROMPT], observe=1)
    compressed = backend.extend(backend.compress(prefill, kept, Dense()), tokens[PROMPT:]).logits
    expected = masked(plain, tokens, kept, backend.shape.query_heads)[PROMPT:]
    torch.testing.assert_close(compressed, expected, atol=2e-4, rtol=2e-4)
    whole = backend.extend(backend.compress(prefill, None, Dense()), tokens[PROMPT:]).logits
    assert not torch.allclose(compressed, whole, atol=1e-2)


def test_un_rotated_keys_are_those_before_the_rotation(family, tokens):
    """As a hook on the last thing before the rotation sees them: the norm of keys where there is one."""
    backend, _ = family
    seen = []
    hooks = []
    for block in backend.model.model.layers:
        before = getattr(block.self_attn, "k_norm", block.self_attn.k_proj)
        hooks.append(
            before.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach().clone()))
        )
    try:
        prefill = backend.prefill(tokens[:PROMPT], observe=1)
    finally:
        for hook in hooks:
            hook.remove()
    shape = backend.shape
    for layer in range(shape.layers):
        expected = seen[layer].reshape(PROMPT, shape.kv_heads, shape.dim).transpose(0, 1)
        unrotated = backend.rope.unrotate(prefill.keys[layer], np.arange(PROMPT))
        torch.testing.assert_close(unrotated, expected, atol=1e-4, rtol=1e-4)


def test_layers_without_a_rotation_among_others_are_refused(tmp_path):
    """SmolLM3 rotates three layers of four: keys of the fourth can't be read as if they had been."""
    config = configured(SmolLM3Config, 4, 2, 16, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    with pytest.raises(ValueError, match=r"rotat"):
        TorchBackend(saved(config, tmp_path / "smollm3"), device="cpu", dtype="float32")


def test_a_mistral_with_a_window_is_refused(tmp_path):
    config = configured(MistralConfig, 4, 2, 16, sliding_window=64)
    with pytest.raises(ValueError, match="do not attend to all tokens"):
        TorchBackend(saved(config, tmp_path / "mistral"), device="cpu", dtype="float32")
