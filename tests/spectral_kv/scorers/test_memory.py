"""Scoring takes little memory beside the keys, and working in blocks changes no score."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.memory import METHODS, layer
from spectral_kv import xp
from spectral_kv.scorers.base import LayerView

BOUND = 4  # times the 16-bit keys
OFTEN = ("wavelet_fourier", "tri", "snapkv")  # measured in the fast tests; the others cost seconds each
each_method = pytest.mark.parametrize("name", METHODS)


def made(name: str, tokens: int, make, dtype: torch.dtype, shape: str = "tiny") -> LayerView:
    """A layer of arrays that `make` makes of NumPy's."""
    view = layer(shape, tokens, min(getattr(METHODS[name], "window", None) or 128, tokens))
    arrays = ("keys", "values", "queries", "future")
    return replace(view, **{a: make(getattr(view, a).cpu().to(dtype).numpy()) for a in arrays})


def peak(name: str, tokens: int) -> float:
    """In units of the keys, of the first call, which makes its tables.

    In bytes that NumPy allocates: no clock and no other process changes them.
    """
    METHODS[name].score(made(name, 1024, np.asarray, torch.float16))  # what is imported at the first use
    view = made(name, tokens, np.asarray, torch.float16, "qwen2.5-0.5b")
    gc.collect()
    tracemalloc.start()
    try:
        scores = METHODS[name].score(view)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scores.shape == view.keys.shape[:2] and np.isfinite(scores).all()
    return most / view.keys.nbytes


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "h2o"],
)
def test_the_peak_of_scoring_is_below_four_times_the_keys(name):
    assert peak(name, 16384) <= BOUND


@pytest.mark.parametrize("name, most", [("wavelet", 10), ("snapkv", 10), ("expected_attention", 20)])
def test_without_blocks_the_peak_is_far_above(name, most, monkeypatch):
    """What the measure is worth."""
    monkeypatch.setattr(xp, "ROOM", 2**60)
    assert peak(name, 8192) > most


def mlx_array(x: np.ndarray) -> xp.Array:
    return pytest.importorskip("mlx.core").array(x)


@each_method
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])
def test_blocks_give_the_scores_of_the_whole(name, make, monkeypatch):
    view = made(name, 1100, make, torch.float32)
    scores = []
    for room in (2**60, 0):
        monkeypatch.setattr(xp, "ROOM", room)
        monkeypatch.setattr(xp, "ACCELERATOR_ROOM", room)
        scores.append(xp.to_numpy(METHODS[name].score(replace(view))))
    whole, in_blocks = scores
    np.testing.assert_allclose(in_blocks, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_blocks_cover_an_axis_and_keep_to_their_room(monkeypatch):
    monkeypatch.setattr(xp, "ROOM", 100)
    array = np.zeros(300, dtype=np.uint8)
    assert xp.blocks(10, 200, array) == [slice(0, 10)]
    assert xp.blocks(10, 1000, array) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert xp.blocks(3, 10**9, array) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert xp.blocks(10, 500, array[:1]) == [slice(i, i + 2) for i in range(0, 10, 2)]
    assert xp.blocks(0, 0, array) == [slice(0, 0)]
