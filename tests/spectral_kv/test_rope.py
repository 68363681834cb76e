import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spectral_kv.rope import Rope


def model_rotation(parameters: dict):
    config = Qwen2Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=parameters
    )
    embedding = Qwen2RotaryEmbedding(config)
    return embedding, Rope(embedding.inv_freq.double().numpy(), float(embedding.attention_scaling))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 1e6}, YARN], ids=["default", "yarn"])
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


def test_logits_depend_on_distance_only(rope, rng):
    q, k = rng.normal(size=(2, 1, 16)).astype(np.float32)
    near = (rope.rotate(q, np.array([10])) * rope.rotate(k, np.array([3]))).sum()
    far = (rope.rotate(q, np.array([1010])) * rope.rotate(k, np.array([1003]))).sum()
    other = (rope.rotate(q, np.array([1010])) * rope.rotate(k, np.array([1004]))).sum()
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - other) > 1e-2
