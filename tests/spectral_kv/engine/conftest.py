"""Cached rows for kernels: on a GPU where there is one, else through Triton's interpreter."""

import pytest
import torch

CUDA = torch.cuda.is_available()


@pytest.fixture
def device() -> str:
    """Where Triton's kernels can run here."""
    pytest.importorskip("triton", reason="needs Triton")
    return "cuda" if CUDA else "cpu"
