"""The configured methods on the embedded model and one document: each chooses its own tokens, tri the right ones."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.config import check
from pipeline.settings.folders import conf_dir
from pipeline.stages.prefill import FullRun
from spectral_kv.attention import attention_mass, attention_weights
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.calibration import QueryStatistics
from spectral_kv.compressor import foresees, observed
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.oracle_mass import OracleMass
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.selection import Budget, select
from tests.conftest import REFERENCE

pytestmark = pytest.mark.slow
TOKENS, FUTURE, BUDGET = 4096, 256, Budget(512)


class Document:
    """One prefill on the embedded model with the queries of all its tokens and of those that follow."""

    def __init__(self, outputs: Path):
        document = [f"document.tokens={TOKENS}", f"document.continuation={FUTURE}", "document.count=1"]
        job = prepare(composed(["method=tri", "model=reference", "document=pydoc", *document, f"outputs={outputs}"]))
        self.backend, self.statistics = TorchBackend(str(REFERENCE), device="cpu"), job.statistics
        self.full = FullRun(self.backend, job.windows[0], TOKENS, observe=TOKENS)
        future, keys = self.full.extended(FUTURE).queries, self.full.prefill.keys
        # [layers, kv_heads, tokens]: how much of their attention the tokens that follow really give
        self.mass = [
            attention_mass(attention_weights(q, k, self.backend.scaling), len(k)).numpy()
            for q, k in zip(future, keys, strict=True)
        ]

    def views(self, scorer=None) -> list[LayerView]:
        """What a scorer sees of every layer."""
        prefill, evictable = self.full.prefill, BUDGET.evictable(TOKENS)
        queries = self.full.queries(observed(scorer, TOKENS))
        future = self.full.extended(scorer.horizon if foresees(scorer) else FUTURE).queries
        return [
            LayerView(
                keys, values, self.backend.rope, np.arange(TOKENS), evictable, scaling=self.backend.scaling,
                index=layer, seed=(0, layer), queries=queries[layer] if queries else None, future=future[layer],
                statistics=self.statistics,
            )
            for layer, (keys, values) in enumerate(zip(prefill.keys, prefill.values, strict=True))
        ]  # fmt: skip

    def kept(self, scorer, statistics: QueryStatistics | None = None) -> list[np.ndarray]:
        """Kept tokens `[kv_heads, budget]` of every layer."""
        views = self.views(scorer)
        if statistics is not None:
            views = [replace(view, statistics=statistics) for view in views]
        return [select(scorer.score(view), BUDGET).numpy() for view in views]

    def recovered(self, kept: list[np.ndarray]) -> np.ndarray:
        """Share of the future attention mass on the kept tokens, `[layers]`."""
        shares = [np.take_along_axis(m, k, axis=1).sum(axis=1) for m, k in zip(self.mass, kept, strict=True)]
        return np.mean(shares, axis=1)


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> Document:
    return Document(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def choices(document) -> dict[str, list[np.ndarray]]:
    """What every option of `conf/method` that selects keeps."""
    options = sorted(path.stem for path in Path(conf_dir()).glob("method/*.yaml"))
    scorers = {option: check(composed([f"method={option}"])).method.scorer for option in options}
    return {option: document.kept(scorer) for option, scorer in scorers.items() if scorer is not None}


def shuffled(statistics: QueryStatistics) -> QueryStatistics:
    """The statistics of the query heads of all layers, dealt out anew."""
    layers, heads, bands = statistics.mu.shape
    order = np.random.default_rng(0).permutation(layers * heads)
    mu, modulus = (x.reshape(-1, bands)[order].reshape(x.shape) for x in (statistics.mu, statistics.modulus))
    return QueryStatistics(mu, modulus)


def test_no_two_methods_are_the_same_method(choices):
    """Mean Jaccard index over layers and heads; oracles that differ by the value norm alone share 0.90."""
    assert len(choices) >= 15
    for one, other in combinations(choices, 2):
        overlap = [
            len(np.intersect1d(a, b)) / len(np.union1d(a, b))
            for layers in zip(choices[one], choices[other], strict=True)
            for a, b in zip(*layers, strict=True)
        ]
        assert np.mean(overlap) < 0.98, f"{one} and {other} keep the same tokens"


def test_tri_recovers_more_future_attention_than_the_controls_and_less_than_the_oracle(document, choices):
    tri, random, streaming = (document.recovered(choices[name]) for name in ("tri", "random", "streaming"))
    assert tri.mean() > random.mean() + 0.2  # 0.69, 0.36 and 0.65 of the mass
    assert tri.mean() > streaming.mean() + 0.02
    assert (tri > random).all() and (tri > streaming).all()  # in every layer
    best = document.recovered(document.kept(OracleMass(FUTURE)))
    assert (best >= tri).all() and best.mean() < tri.mean() + 0.1


def test_tri_with_the_statistics_of_other_heads_does_worse(document, choices):
    own = document.recovered(choices["tri"])
    other = document.recovered(document.kept(TriAttention(), shuffled(document.statistics)))
    assert own.mean() > other.mean() + 0.15  # 0.69 and 0.44
    assert (own > other).mean() >= 0.75


def correlations(document: Document, statistics: QueryStatistics) -> np.ndarray:
    """Of expected and true mean logits over the evictable tokens, one for every layer and query head."""
    found = []
    for view in document.views():
        kv_heads, _, dim = view.keys.shape
        mean = view.future.float().mean(dim=1).reshape(kv_heads, -1, dim)
        true = (view.keys.float() @ mean.transpose(1, 2))[:, view.evictable]  # [kv_heads, tokens, group]
        expected = TriAttention().expectation(replace(view, statistics=statistics))[:, view.evictable]
        for head in range(kv_heads):
            for member in range(mean.shape[1]):
                found.append(np.corrcoef(true[head, :, member], expected[head, :, member])[0, 1])
    return np.array(found)


def test_tri_expects_the_mean_logits_that_come(document):
    """Text of the calibration and of the document share nothing; the median correlation is 0.91."""
    own = correlations(document, document.statistics)
    assert len(own) == 48 and (own > 0.5).mean() >= 0.9 and np.median(own) > 0.8
    assert np.median(correlations(document, shuffled(document.statistics))) < 0.4
