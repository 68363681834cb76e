"""Every kind of array the core runs on."""

import numpy as np
import pytest
import torch


@pytest.fixture(params=["numpy", "torch", "mlx"])
def make(request):
    """Turns a NumPy array into one of the kind."""
    if request.param == "mlx":
        return pytest.importorskip("mlx.core").array
    return {"numpy": np.asarray, "torch": torch.from_numpy}[request.param]
