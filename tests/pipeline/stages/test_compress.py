"""What the jobs of a sweep share of a document, and what they must not."""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from pipeline.phases.drift import Drift
from pipeline.phases.perplexity import Perplexity
from pipeline.phases.perturbation import Perturbation
from pipeline.stages.compress import Compressed, compress
from pipeline.stages.prefill import FullRun
from spectral_kv.compressor import Compressor, SharedScores
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.random import Random
from spectral_kv.selection import Budget
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import Array, to_numpy


@dataclass(frozen=True)
class Slow:
    """Counts how often it is asked, takes its time, and scores by `factor * position`."""

    factor: float = 1.0

    reads: ClassVar[tuple[str, ...]] = ("keys",)
    asked: ClassVar[list[int]] = []

    def score(self, layer: LayerView) -> Array:
        self.asked.append(layer.index)
        time.sleep(0.02)
        return self.factor * layer.keys.new_tensor(range(layer.tokens)).expand(len(layer.keys), -1)


@pytest.fixture
def document(rng) -> np.ndarray:
    return rng.integers(2, 8000, size=160)


@pytest.fixture
def full(backend, document) -> FullRun:
    return FullRun(backend, document, 100, observe=1)


@pytest.fixture
def compressed(full):
    """Compresses the document by a scorer; scores are shared."""
    shared = SharedScores()

    def run(scorer, tokens: int = 30, sinks: int = 2, document: int = 0) -> Compressed:
        return compress(Compressor(full.backend, scorer, Budget(tokens, sinks, 4), Dense()), full, shared, document)

    return run


def test_a_method_scores_a_document_once_for_all_budgets_and_every_budget_counts_the_seconds(compressed):
    Slow.asked.clear()
    first, second = (compressed(Slow(), tokens) for tokens in (30, 50))
    assert Slow.asked == [0, 1]
    assert min(first.seconds, second.seconds) >= 0.04
    assert to_numpy(first.kept[1])[0].tolist() == [0, 1, *range(72, 100)]
    assert to_numpy(second.kept[1])[0].tolist() == [0, 1, *range(52, 100)]


def test_another_parameter_window_or_document_is_scored_anew(compressed):
    compressed(Slow())
    assert to_numpy(compressed(Slow(-1.0)).kept[0])[0].tolist() == [*range(26), *range(96, 100)]
    Slow.asked.clear()
    compressed(Slow(), sinks=3)
    compressed(Slow(), document=1)
    assert Slow.asked == [0, 1, 0, 1]
    kept = [to_numpy(compressed(Random(seed=0), document=d).kept[0]).tolist() for d in (0, 1, 0)]
    assert kept[0] == kept[2] != kept[1]


@pytest.mark.parametrize("phase", [Perturbation(8), Perplexity(20, recent=8), Drift(2, 20, positions=8)])
def test_what_a_phase_keeps_of_the_full_cache_does_not_change_what_it_finds(backend, document, full, phase):
    """After another method's turn the rows are those of a document that nobody measured before."""
    from pipeline.phases.base import Context

    def measured(run: FullRun, scorer) -> list[dict]:
        compressor = Compressor(backend, scorer, Budget(30, 2, 4), Dense(), None)
        return phase.measure(Context(backend, run, compress(compressor, run, SharedScores(), 0), compressor, 0, []))

    others = measured(full, Random(seed=1))
    shared = measured(full, Slow())
    assert shared == measured(FullRun(backend, document, 100, observe=1), Slow())
    assert shared != others


def test_what_is_kept_of_a_document_counts_towards_its_bytes(full):
    before = full.nbytes
    full.once("pair", lambda: ([np.zeros(10)], "name", np.zeros(5, dtype=np.float32)))
    assert full.nbytes == before + 80 + 20
    extension = full.extended(16)
    assert full.nbytes == before + 100 + sum(x.nbytes for x in (extension.logits, *extension.queries))
