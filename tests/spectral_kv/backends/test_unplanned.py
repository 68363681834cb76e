"""Which kernels of attention torch may take while lengths are new at every step."""

import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectral_kv.backends import torch as torch_backend
from spectral_kv.backends import torch_runs
from spectral_kv.backends import unplanned as of_process
from spectral_kv.backends.unplanned import SHORT, unplanned

planned = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture(autouse=True)
def as_it_was():
    assert planned()
    yield
    assert planned()


def test_kernels_with_plans_are_out_until_the_last_one_leaves():
    with unplanned():
        assert not planned()
        with unplanned():
            assert not planned()
        assert not planned()


def test_threads_that_overlap_leave_the_choice_as_it_was():
    entered, go = threading.Event(), threading.Event()

    def other():
        with unplanned():
            entered.set()
            go.wait(10)
            seen.append(planned())

    seen = []
    thread = threading.Thread(target=other)
    with unplanned():
        thread.start()
        assert entered.wait(10)
    assert not planned()  # the other one is still inside
    go.set()
    thread.join(10)
    assert seen == [False] and planned()


def test_an_error_gives_it_back():
    with pytest.raises(KeyError), unplanned():
        raise KeyError
    assert planned()


def test_a_fork_while_someone_is_inside_gives_it_back_in_the_child():
    with unplanned(), of_process._lock:  # another thread's
        of_process._forked()
        assert planned() and not of_process._lock.locked()
        with unplanned():
            assert not planned()
        assert planned()
    assert planned() and of_process._inside == 0
    with unplanned():
        assert not planned()


@pytest.mark.parametrize("allowed, inside", [(SDPBackend.CUDNN_ATTENTION, True), (SDPBackend.MATH, False)])
def test_whoever_allows_one_kernel_gets_it(allowed, inside):
    with sdpa_kernel(allowed), unplanned():
        assert planned() is inside


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("fed, with_plans", [(1, False), (9, False), (SHORT + 1, True)])
def test_few_new_tokens_after_a_cache_are_attended_without_plans(monkeypatch, backend, rng, ragged, fed, with_plans):
    from spectral_kv.storage.dense import Dense

    seen = []

    def spy(function):
        def called(*arguments, **more):
            seen.append(planned())
            return function(*arguments, **more)

        return called

    for module, name in ((torch_backend, "sdpa_attention_forward"), (torch_runs, "scaled_dot_product_attention")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    prompt = rng.integers(0, backend.shape.vocabulary, 40)
    prefill = backend.prefill(prompt, 0)
    assert seen and all(seen)  # a prompt's length comes again
    seen.clear()
    heads = [torch.arange(20 + 5 * ragged * head) for head in range(backend.shape.kv_heads)]
    kept = [heads if ragged else torch.stack(heads)] * backend.shape.layers
    backend.extend(backend.compress(prefill, kept, Dense()), rng.integers(0, backend.shape.vocabulary, fed))
    assert len(seen) == backend.shape.layers * (backend.shape.kv_heads if ragged else 1)
    assert set(seen) == {with_plans and not ragged}


def test_decoding_is_without_plans_by_the_backend_and_by_transformers_own_generate(monkeypatch, backend, rng):
    import spectral_kv
    from spectral_kv.storage.dense import Dense

    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spied(*arguments, **more):
        seen.append(planned())
        return attention(*arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    layers, prompt = backend.shape.layers, rng.integers(0, backend.shape.vocabulary, 40)
    backend.generate(backend.compress(backend.prefill(prompt, 0), None, Dense()), 7, 3)
    assert seen == [True] * layers + [False] * 3 * layers
    seen.clear()
    monkeypatch.setattr(backend.model.config, "_attn_implementation", "sdpa")  # as before, afterwards
    cache = spectral_kv.cache(backend.model, "knorm", spectral_kv.Budget(20, sinks=2, recent=4))
    ids = torch.from_numpy(prompt)[None]
    backend.model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [True] * layers + [False] * 2 * layers
