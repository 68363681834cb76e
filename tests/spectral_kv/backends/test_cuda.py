"""The torch backend on a GPU; skipped where there is none."""

import gc

import numpy as np
import pytest
import torch

from spectral_kv.backends.torch import TorchBackend
from spectral_kv.compressor import Compressor
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BUDGET = Budget(60, sinks=2, recent=8)


@pytest.fixture(scope="module")
def gpu(checkpoint):
    return TorchBackend(str(checkpoint), device="cuda", dtype="float32", cache_dtype="float32")


@pytest.fixture
def tokens(rng):
    return rng.integers(2, 8000, size=300)


def keep(backend, prefill):
    views = [
        LayerView(k, v, backend.rope, np.arange(200), BUDGET.evictable(200), scaling=1, index=i)
        for i, (k, v) in enumerate(zip(prefill.keys, prefill.values, strict=True))
    ]
    return [select(Wavelet().score(view), BUDGET) for view in views]


def test_the_gpu_keeps_the_tokens_and_gives_the_logits_of_the_cpu(backend, gpu, tokens):
    results = []
    for b in (backend, gpu):
        prefill = b.prefill(tokens[:200], observe=10)
        kept = keep(b, prefill)
        cache = b.compress(prefill, kept, Dense())
        results.append((torch.stack(kept).cpu(), b.extend(cache, tokens[200:]).logits.cpu()))
    (cpu_kept, cpu_logits), (gpu_kept, gpu_logits) = results
    assert (cpu_kept == gpu_kept).float().mean() > 0.99
    torch.testing.assert_close(cpu_logits, gpu_logits, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("storage", [Dense(), TurboQuantStorage(sinks=2, recent=16)], ids=["dense", "packed"])
def test_the_allocator_holds_what_the_cache_counts(gpu, tokens, storage):
    prefill = gpu.prefill(np.resize(tokens, 2000), observe=1)
    gpu.compress(prefill, None, storage)  # builds what is cached once: rotations, handles
    gc.collect()
    before = torch.cuda.memory_allocated()
    cache = gpu.compress(prefill, None, storage)
    held = torch.cuda.memory_allocated() - before
    tensors = 4 * 8  # at most, in two layers
    assert cache.nbytes <= held <= cache.nbytes + 512 * tensors


@pytest.mark.parametrize("storage", [Dense(), TurboQuantStorage(sinks=2, recent=16)], ids=["dense", "packed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_compression_by_one_captured_pass_makes_the_same_cache(monkeypatch, gpu, rng, storage, batch):
    from spectral_kv.engine import captured

    compressor, passes = Compressor(gpu, Wavelet(), BUDGET, storage), []
    monkeypatch.setattr(
        gpu, "select_and_compress", lambda *a, take=gpu.select_and_compress: passes.append(take(*a)) or passes[-1]
    )
    for _ in range(3):
        prefill = gpu.prefill(rng.integers(2, 8000, size=2000), observe=1)
        scores = compressor.scores(prefill)
        cache, kept, _ = compressor.select_and_store(prefill, scores, batch)
        want = compressor.select(scores)
        other = compressor.store(prefill, want, batch)
        assert torch.equal(kept, want)
        assert (cache.nbytes, cache.position) == (other.nbytes, other.position)
        for one, same in zip(cache.layers, other.layers, strict=True):
            np.testing.assert_array_equal(one.positions, same.positions)
            for a, b in zip(one.stored.load(), same.stored.load(), strict=True):
                assert torch.equal(a, b)
    assert passes[-1] is not None and captured._graphs


@pytest.mark.parametrize("scorer", [Wavelet(), Fourier(), Random()])
def test_scores_and_compression_in_one_graph_make_the_same_cache(gpu, rng, scorer):
    from spectral_kv.engine import captured

    captured._graphs.clear()
    captured._seen.clear()
    compressor, found = Compressor(gpu, scorer, BUDGET, Dense()), []
    for _ in range(4):
        prefill = gpu.prefill(rng.integers(2, 8000, size=2000), observe=1)
        found.append((prefill, *compressor.compress(prefill)))
    if not isinstance(scorer, Random):  # whose scores come layer by layer
        assert len(captured._graphs) == 1, "no others than the one of all"
    for prefill, cache, kept in found:  # after the graph has written other results
        want = compressor.choose(prefill)
        other = compressor.store(prefill, want)
        assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))
        for one, same in zip(cache.layers, other.layers, strict=True):
            np.testing.assert_array_equal(one.positions, same.positions)
            for a, b in zip(one.stored.load(), same.stored.load(), strict=True):
                assert torch.equal(a, b)


def test_bfloat16_is_the_default_on_a_gpu(checkpoint, tokens):
    backend = TorchBackend(str(checkpoint), device="auto", dtype="auto")
    assert (backend.device.type, backend.dtype) == ("cuda", torch.bfloat16)
    prefill = backend.prefill(tokens[:200], observe=1)
    cache = backend.compress(prefill, keep(backend, prefill), Dense())
    assert backend.extend(cache, tokens[200:]).logits.isfinite().all()


@pytest.mark.parametrize("allocation", ["layer", "head", "global"])
def test_the_allocator_gives_ragged_heads_what_the_budget_says(gpu, tokens, allocation):
    """However long the longest head is; twice the budget takes twice the bytes."""
    prefill, found = gpu.prefill(np.resize(tokens, 2000), observe=1), []
    for budget in (200, 400):
        compressor = Compressor(gpu, Random(), Budget(budget, 2, 8, allocation=allocation), Dense())
        kept = compressor.select([x * (i + 1) for i, x in enumerate(compressor.scores(prefill))])
        assert len({len(head) for layer in kept for head in layer}) > 1
        compressor.store(prefill, kept)
        gc.collect()
        before = torch.cuda.memory_allocated()
        cache = compressor.store(prefill, kept)
        found.append(torch.cuda.memory_allocated() - before)
        due = 2 * 2 * budget * 16 * 4 * 2  # layers, heads, tokens, channels, bytes, keys and values
        assert cache.nbytes == cache.allocated == due <= found[-1] <= due + 512 * 8
        del cache  # else it makes room for the next one
    assert found[1] > 1.9 * found[0]


def test_ragged_heads_give_the_logits_of_the_cpu(backend, gpu, tokens, rng):
    """Random lengths in every layer and head: fed together, and decoded token by token."""
    for _ in range(6):
        kept = [[np.sort(rng.choice(200, rng.integers(1, 200), replace=False)) for _ in range(2)] for _ in range(2)]
        answers = []
        for b in (backend, gpu):
            prefill = b.prefill(tokens[:200], observe=1)
            places = [[torch.as_tensor(head, device=b.device) for head in layer] for layer in kept]
            cache = b.compress(prefill, places, Dense())
            logits = b.extend(cache, tokens[200:220]).logits.cpu()
            answers.append((logits, b.extend(cache, tokens[220:221]).logits.cpu()))
        for ours, theirs in zip(*answers, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("fed", [1, 7])
def test_few_new_tokens_start_no_kernel_that_is_planned_for_their_length(checkpoint, tokens, rng, ragged, fed):
    from torch.profiler import ProfilerActivity, profile

    eager = TorchBackend(str(checkpoint), device="cuda", engine="eager")
    prefill = eager.prefill(tokens[:200], observe=1)
    heads = [torch.arange(50 + 3 * ragged * head) for head in range(eager.shape.kv_heads)]
    kept = [[h.cuda() for h in heads] if ragged else torch.stack(heads).cuda()] * eager.shape.layers
    cache = eager.compress(prefill, kept, Dense())
    eager.extend(cache, tokens[200:203])
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        logits = eager.extend(cache.copy(), tokens[203 : 203 + fed]).logits
        torch.cuda.synchronize()
    names = {event.key for event in seen.key_averages()}
    assert any("attention" in name for name in names)
    assert not [name for name in names if "cudnn" in name and "attention" in name]
    one_by_one = [eager.extend(cache, tokens[i : i + 1]).logits for i in range(203, 203 + fed)]
    torch.testing.assert_close(logits, torch.cat(one_by_one), atol=0.1, rtol=0.05)
