"""Lookups of coded rows on a CPU, and the thread that does those of values."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

from spectral_kv.engine import rows
from spectral_kv.quantization.codebook import codebook
from spectral_kv.quantization.packing import pack, unpack


def asked():
    """The thread that does the work, and whether it is in inference mode there."""
    return threading.get_ident(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("inference", [True, False])
def test_a_second_thread_works_where_torch_has_one(monkeypatch, inference):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.inference_mode(inference):
        (thread, mode), (again, _) = rows._beside(asked)(), rows._beside(asked)()
    assert thread == again != threading.get_ident() and mode == inference
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert rows._beside(asked)()[0] == threading.get_ident()


def test_what_fails_in_the_second_thread_fails_here(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        rows._beside(lambda: 1 / 0)()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_a_second_thread_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows._beside(asked)()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if rows._beside(asked)()[0] != threading.get_ident() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_lookup_gives_centroids_in_its_own_order(rng, bits):
    codes = pack(rng.integers(0, 2**bits, size=(2, 3, 50, 64)).astype(np.uint8), bits)
    lookup = rows.Lookup(bits, 64)
    want = codebook(bits)[0][unpack(codes, bits)][..., lookup.order]
    held = torch.from_numpy(np.pad(codes, [(0, 0), (0, 0), (0, 7), (0, 0)]))[:, :, :50]  # as a part of a buffer
    np.testing.assert_array_equal(lookup(held), want.astype(np.float32))
