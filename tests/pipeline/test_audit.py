"""Defects of the published evaluation that must not come back."""

from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.compare import documents
from pipeline.phases.throughput import Throughput
from spectral_kv.storage.dense import Dense
from spectral_kv.storage.turboquant import TurboQuantStorage


@pytest.mark.parametrize("method", ["wavelet", "tri", "snapkv", "oracle_mass"])
def test_the_budget_is_all_that_is_kept_the_window_included(run, method):
    for recent in (8, 50):
        metrics = run(f"method={method}", f"budget.recent={recent}").metrics
        assert metrics["memory/tokens"] == 60
        assert metrics["memory/bytes"] == 60 * 2 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, dim, bytes
    full = run("method=full").metrics["memory/mb"]
    assert metrics["memory/mb_after_generation"] == pytest.approx(full * (60 + 8) / 200)  # generated tokens apart


def test_nd_ppl_is_the_ratio(run):
    result = run("method=knorm")
    table = documents(result)
    relative = (table["ppl/comp"] - table["ppl/full"]) / table["ppl/full"]
    assert (table["ppl/nd"] - relative).abs().max() < 1e-6
    assert result.metrics["ppl/nd"] == pytest.approx(relative.mean(), rel=1e-6)
    assert (table["ppl/nd"] - (table["ppl/comp"] - table["ppl/full"])).abs().min() > 1e-3  # not the difference


def test_the_first_continuation_token_is_not_scored(backend, rng):
    """Its prediction was made by the full cache: whatever token it is said to be, the loss is that of the others."""
    from scipy.special import log_softmax

    from pipeline.phases.base import Context
    from pipeline.phases.perplexity import Perplexity
    from pipeline.stages.compress import Compressor
    from pipeline.stages.prefill import FullRun
    from spectral_kv.scorers.streaming import Streaming
    from spectral_kv.selection import Budget

    full = FullRun(backend, rng.integers(2, 8000, size=112), 100, observe=1)
    compressor = Compressor(backend, Streaming(), Budget(20, 2, 8), Dense(), None)
    compressed = compressor.compress(full, 0)
    context = Context(backend, full, compressed, compressor, 0, [])
    found = {row["metric"]: row["value"] for row in Perplexity(tokens=12).measure(context)}
    logits = backend.extend(compressed.cache.copy(), full.continuation).logits.double().numpy()
    nll = [-log_softmax(logits[i])[full.continuation[i + 1]] for i in range(11)]
    assert np.log(found["ppl/comp"]) == pytest.approx(np.mean(nll), rel=1e-6)


def test_every_speed_up_is_against_the_full_cache_of_its_own_run(monkeypatch):
    """With a clock that says how long each cache takes, the speed-up is the ratio of the two, repeat by repeat."""
    taken = {"full": iter([4.0, 5.0, 6.0]), "compressed": iter([2.0, 2.0, 2.0])}

    class Cache(str):
        def copy(self):
            return self

    class Machine:
        def compress(self, prefill, kept, storage, batch):
            return Cache("full" if kept is None else "compressed")

        def generate(self, cache, token, count):
            return [1] * count

        def peak_bytes(self):
            return None

        def other_kernel(self):
            from contextlib import nullcontext

            return nullcontext()

    class Fixed:
        document, backend = 0, Machine()

        class full:
            prefill, continuation, seconds = None, [0], 0.5

        class compressed:
            kept, seconds = [], 0.1

        class compressor:
            storage = Dense()

    monkeypatch.setattr(Throughput, "_timed", lambda self, context, cache: ([1] * 10, next(taken[str(cache)])))
    rows = Throughput(tokens=10, repeats=3).measure(Fixed())
    found = {row["metric"]: row["value"] for row in rows}
    assert found["throughput/speedup"] == 2.5
    assert found["throughput/full_tok_s"] == 2.0 and found["throughput/tok_s"] == 5.0


@dataclass(frozen=True)
class Simulated(TurboQuantStorage):
    """Codes are made and thrown away: what lives is dense."""

    def store(self, keys, values, layer):
        return Dense().store(*super().store(keys, values, layer).load(), layer)


def test_simulated_savings_count_as_none(run, monkeypatch):
    settings = ["method=full", "storage=turboquant_4bit", "storage.recent=16"]
    packed = run(*settings).metrics["memory/ratio"]
    simulated = run(*settings, f"storage._target_={__name__}.Simulated").metrics["memory/ratio"]
    assert packed > 2
    assert simulated == 1.0
