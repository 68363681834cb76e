import importlib

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spectral_kv.backends.torch import TorchBackend
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import rows

DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
ROTATIONS = pytest.mark.parametrize("parameters", [DEFAULT, YARN], ids=["default", "yarn"])


def model_rotation(parameters: dict):
    config = Qwen2Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=parameters
    )
    embedding = Qwen2RotaryEmbedding(config)
    return embedding, Rope(embedding.inv_freq.double().numpy(), float(embedding.attention_scaling))


def random_backend(folder, parameters: dict) -> TorchBackend:
    """A random float32 Qwen2 checkpoint with this rotation: 2 layers, 4 query and 2 KV heads of 16."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters=parameters,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    for block in model.model.layers:
        torch.nn.init.normal_(block.self_attn.k_proj.bias)
    model.save_pretrained(folder)
    return TorchBackend(str(folder), device="cpu", dtype="float32", cache_dtype="float32")


@ROTATIONS
def test_rotates_as_the_model_does_and_back(parameters, rng):
    embedding, rope = model_rotation(parameters)
    x = torch.from_numpy(rng.normal(size=(2, 300, 16)).astype(np.float32))
    positions = np.arange(700, 1000)
    cos, sin = embedding(x, torch.from_numpy(positions)[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    rotated = rope.rotate(x, positions)
    assert (rope.attention_scaling != 1) == (parameters is YARN)
    torch.testing.assert_close(rotated, expected[0], atol=2e-4, rtol=0)  # the model's own angles are float32
    torch.testing.assert_close(rope.unrotate(rotated, positions), x, atol=1e-5, rtol=0)


@ROTATIONS
def test_every_head_is_turned_back_by_its_own_positions(parameters, rng):
    """After per-head eviction, keys that the model rotated come back as they were."""
    embedding, rope = model_rotation(parameters)
    x = torch.from_numpy(rng.normal(size=(3, 200, 16)).astype(np.float32))
    cos, sin = embedding(x, torch.arange(200)[None])
    rotated, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    kept = torch.from_numpy(np.sort([rng.permutation(200)[:40] for _ in range(3)], axis=1))
    plain, positions = rows(x, kept), kept.numpy()
    restored = rope.unrotate(rows(rotated[0], kept), positions)
    torch.testing.assert_close(restored, plain, atol=5e-5, rtol=0)  # the model's own angles are float32
    torch.testing.assert_close(rope.unrotate(rope.rotate(plain, positions), positions), plain, atol=1e-5, rtol=0)
    by_the_first = rope.unrotate(rows(rotated[0], kept), positions[0])
    torch.testing.assert_close(by_the_first[0], restored[0])
    assert (by_the_first[1:] - restored[1:]).abs().amax(dim=(1, 2)).min() > 1


@ROTATIONS
def test_cached_keys_turn_back_to_what_the_projection_gave_before_and_after_eviction(parameters, tmp_path, rng):
    """Two evictions of other tokens in every layer and head, with tokens fed between and after them."""
    backend = random_backend(tmp_path, parameters)
    assert (backend.rope.attention_scaling != 1) == (parameters is YARN)
    tokens = rng.integers(300, size=60)
    plain = [[], []]  # the keys [tokens, kv_heads, dim] of every forward pass, un-rotated
    for layer, block in enumerate(backend.model.model.layers):
        block.self_attn.k_proj.register_forward_hook(
            lambda module, inputs, output, layer=layer: plain[layer].append(output[0].reshape(-1, 2, 16))
        )

    def subset(size: int, kept: int) -> list[torch.Tensor]:
        return [torch.from_numpy(np.sort([rng.permutation(size)[:kept] for _ in range(2)], axis=1)) for _ in range(2)]

    prefill = backend.prefill(tokens[:40], observe=1)
    for layer in range(2):
        view = LayerView(
            prefill.keys[layer], prefill.values[layer], backend.rope, prefill.positions[layer], slice(0, 40), scaling=1
        )
        torch.testing.assert_close(view.unrotated, plain[layer][0].transpose(0, 1), atol=1e-5, rtol=0)

    cache = backend.compress(prefill, subset(40, 15), Dense())
    backend.extend(cache, tokens[40:52])
    cache = backend.recompress(cache, subset(27, 14))
    backend.extend(cache, tokens[52:])
    contents = backend.contents(cache)
    for layer in range(2):
        positions = contents.positions[layer]
        assert positions.shape == (2, 22) and (positions[0] != positions[1]).any()
        view = LayerView(contents.keys[layer], contents.values[layer], backend.rope, positions, slice(0, 22), scaling=1)
        every = torch.cat(plain[layer])  # [60, kv_heads, dim]
        expected = torch.stack([every[positions[head], head] for head in range(2)])
        torch.testing.assert_close(view.unrotated, expected, atol=1e-5, rtol=0)


def test_logits_depend_on_distance_only(rope, rng):
    q, k = rng.normal(size=(2, 1, 16)).astype(np.float32)
    near = (rope.rotate(q, np.array([10])) * rope.rotate(k, np.array([3]))).sum()
    far = (rope.rotate(q, np.array([1010])) * rope.rotate(k, np.array([1003]))).sum()
    other = (rope.rotate(q, np.array([1010])) * rope.rotate(k, np.array([1004]))).sum()
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - other) > 1e-2


def test_positions_of_every_head_are_looked_up_in_one_table(rope, rng, monkeypatch):
    """Trigonometry is done once for all layers and heads, and gives what it gives position by position."""
    module = importlib.import_module("spectral_kv.rope")
    asked = []
    waves = module._waves
    monkeypatch.setattr(module, "_waves", lambda *known: (asked.append(known[2]), waves(*known))[1])
    for _ in range(3):
        positions = np.sort(rng.integers(0, 9000, size=(2, 50)), axis=1)
        x = torch.from_numpy(rng.normal(size=(2, 50, 16)).astype(np.float32))
        found = rope.unrotate(x, positions)
        for head in range(2):
            assert torch.equal(found[head], rope.unrotate(x[head], positions[head]))
    tables = [shape for shape in asked if shape != (50,)]
    assert set(tables) == {(12288,)} and waves.cache_info().hits >= 2


def test_no_positions_give_no_rotations():
    _, rope = model_rotation(DEFAULT)
    assert rope.rotate(np.zeros((2, 0, 16), dtype=np.float32), np.zeros(0)).shape == (2, 0, 16)
