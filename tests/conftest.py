"""Fixtures: small checkpoints made on the spot, so that every test runs offline."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whichever test that is

from pipeline.settings.folders import PACKAGE
from pipeline.stages.fast_blas import fast_blas
from spectral_kv.rope import Rope

REFERENCE = PACKAGE / "reference_model" / "checkpoint"


def pytest_configure(config: pytest.Config) -> None:
    fast_blas()  # before a test imports MLX


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A randomly initialised Qwen2 checkpoint: 2 layers, 4 query and 2 KV heads of 16, with random biases."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def backend(checkpoint):
    """The random checkpoint in float32, its cache too."""
    from spectral_kv.backends.torch import TorchBackend

    return TorchBackend(str(checkpoint), device="cpu", dtype="float32", cache_dtype="float32")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def rope() -> Rope:
    """Frequencies of a head of 16 channels."""
    return Rope(10_000.0 ** -(np.arange(8) / 8))
