"""The kernels of the pass over keys: on a GPU, or through Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_received
from spectral_kv.backends.base import Prefill
from spectral_kv.engine.banded import plan
from spectral_kv.rope import Rope
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select

TOKENS = 1100


@pytest.fixture
def keys(rng, device):
    """Two layers of rotated keys, `[kv_heads, tokens, dim]`."""
    return [torch.from_numpy(rng.normal(size=(2, TOKENS, 32))).float().to(device) for _ in range(2)]


@pytest.mark.parametrize(
    "scorer, layers",
    [
        (Fourier(), 1),
        *(pytest.param(s, 2, marks=pytest.mark.slow) for s in (Wavelet(), Fourier(), Fourier(cutoff=0.4))),
    ],
)
def test_deviations_and_norms_of_all_layers(keys, scorer, layers):
    from spectral_kv.engine.scoring import deviations

    keys = keys[:layers]

    rope = Rope(10_000.0 ** -(np.arange(16) / 16), attention_scaling=1.3)
    got, norms = (x.cpu() for x in deviations(plan(scorer, TOKENS), keys, rope))
    for layer, k in enumerate(keys):
        x = rope.unrotate(k.double().cpu(), np.arange(TOKENS))
        rows = slice(2 * layer, 2 * layer + 2)
        want = scorer.spectral(x.float())
        assert (got[rows] - want).norm() < 2e-4 * want.norm()
        torch.testing.assert_close(norms[rows], x.norm(dim=-1).float(), rtol=1e-5, atol=1e-5)


def test_keys_that_no_kernel_can_read(keys):
    from spectral_kv.engine.scoring import suits

    assert suits(keys)
    assert not suits([k.double() for k in keys])
    assert not suits([keys[0], keys[1].to("meta")]), "on another device"
    assert not suits([k[..., :24].contiguous() for k in keys])
    assert not suits([k[..., 1:].contiguous().mT for k in keys])


def test_kept_rows_of_all_layers(rng, keys):
    from spectral_kv.engine.scoring import kept_rows

    values = [torch.randn_like(k) for k in keys]
    kept = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(TOKENS), (4, 1)), axis=1)[:, :70])).view(2, 2, 70)
    got = kept_rows(keys, values, kept.to(keys[0].device)).cpu()
    want = torch.stack(keys + values).cpu().gather(2, kept.repeat(2, 1, 1)[..., None].expand(-1, -1, -1, 32))
    torch.testing.assert_close(got[:, 0], want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scores", "whole"),
    [
        ("normal", True),
        ("few values", True),
        ("signed zeros", True),
        ("all but one", True),
        ("few values", False),
        pytest.param("normal", False, marks=pytest.mark.slow),
    ],
)
def test_the_highest_scores_are_those_of_a_sort(monkeypatch, rng, device, whole, scores):
    from spectral_kv.engine import scoring

    monkeypatch.setattr(scoring, "ROWS_WHOLE", 300 if whole else 0)
    monkeypatch.setattr(scoring, "TILE_OF_MANY", 128)
    budget = Budget(100, sinks=3, recent=20) if scores != "all but one" else Budget(299, 3, 20)
    x = {
        "few values": rng.integers(-2, 3, (2, 300)).astype(np.float32),
        "signed zeros": np.where(rng.random((2, 300)) < 0.5, 0.0, -0.0).astype(np.float32),
    }.get(scores, rng.normal(size=(2, 300)).astype(np.float32))
    x[:, :3] = x[:, -20:] = np.nan  # nobody looks at them
    x[0, 50] = np.inf
    quota = budget.tokens - 23
    got, question = scoring.highest(torch.from_numpy(x).to(device), budget.evictable(300), quota)
    np.testing.assert_array_equal(got.cpu().numpy(), select(x, budget))
    question()
    x[1, 60] = np.nan
    _, question = scoring.highest(torch.from_numpy(x).to(device), budget.evictable(300), quota)
    with pytest.raises(ValueError, match="NaN"):
        question()


def test_moments_of_queries_that_lie_token_by_token(rng, device):
    from spectral_kv.engine.expected import moments

    heads, observed, tokens = 3, 150, 200
    rope = Rope(10_000.0 ** -(np.arange(16) / 16))
    x = [torch.from_numpy(rng.normal(3, 1, (observed, heads, 32)).astype(np.float32)) for _ in range(2)]
    queries = [q.to(device).transpose(0, 1) for q in x]
    count, mean, covariance = moments(queries, rope, tokens, sinks=60)
    assert count == 140
    plain = torch.cat([rope.unrotate(q.double().transpose(0, 1), np.arange(50, 200))[:, 10:] for q in x])
    torch.testing.assert_close(mean.cpu(), plain.mean(1).float(), rtol=1e-5, atol=1e-5)
    centred = plain - plain.mean(1, keepdim=True)
    torch.testing.assert_close(covariance.cpu(), (centred.mT @ centred / 140).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="leaves no query"):
        moments(queries, rope, tokens, sinks=200)


@pytest.mark.parametrize("causal", [True, False])
def test_received_attention_is_that_of_the_array_code(rng, device, causal):
    from spectral_kv.engine.received import received, suits

    queries = torch.from_numpy(rng.normal(size=(70, 4, 16))).float().transpose(0, 1)  # as a model leaves them
    keys = torch.from_numpy(rng.normal(size=(2, 150, 16))).float()
    want = attention_received(queries, keys, 0.7, causal)
    assert suits(queries, keys)
    got = received(queries.to(device), keys.to(device), 0.7, causal)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_pass_finds_other_keys_and_keeps_what_it_reads():
    from spectral_kv.engine import captured, scoring
    from spectral_kv.engine.together import in_one_pass
    from spectral_kv.scorers.base import LayerView

    rope = Rope(10_000.0 ** -(np.arange(16) / 16))
    captured._graphs.clear()
    captured._seen.clear()

    def drawn():
        keys = [torch.randn(2, TOKENS, 32, device="cuda") for _ in range(3)]
        prefill = Prefill(np.arange(TOKENS), keys, keys, [], None)
        first = LayerView(keys[0], keys[0], rope, np.arange(TOKENS), slice(4, TOKENS - 64), scaling=1)
        return prefill, first

    results = []
    for turn in range(4):  # eager, captured, replayed, replayed after caches were emptied
        prefill, first = drawn()
        if turn == 3:
            scoring._tables.clear()
            scoring._waves.cache_clear()
            torch.cuda.empty_cache()
        got = in_one_pass(Wavelet(), first, prefill, None)
        want = torch.stack([Wavelet().score(replace(first, keys=k)) for k in prefill.keys])
        torch.testing.assert_close(got[:, :, first.evictable], want[:, :, first.evictable], rtol=1e-4, atol=1e-4)
        results.append(got)
    assert len(captured._graphs) == 1
    assert not torch.equal(results[2], results[3]), "results are their own, not the graph's buffer"
