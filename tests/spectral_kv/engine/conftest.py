"""Cached rows for kernels: on a GPU where there is one, else through Triton's interpreter."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined


@pytest.fixture
def device() -> str:
    """Where Triton's kernels can run here."""
    pytest.importorskip("triton", reason="needs Triton")
    return "cuda" if CUDA else "cpu"
