"""Selection and kept rows of all layers in one graph; without a GPU the same runs without one."""

import numpy as np
import pytest
import torch

from spectral_kv.engine import captured, together
from spectral_kv.engine.compaction import kept
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.selection import Budget, select
from spectral_kv.xp import rows

REPLAYED = captured.replayed
LAYERS, HEADS, TOKENS, DIM = 3, 2, 300, 16
BUDGET = Budget(70, sinks=3, recent=20)


class Again:
    """In place of a graph."""

    def __init__(self, run):
        self.run, self.out = run, run()

    def replay(self) -> None:
        for old, new in zip(self.out, self.run(), strict=True):
            old.copy_(new)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """None of other tests; without a GPU functions that run again."""
    captured._graphs.clear()
    captured._seen.clear()
    if not torch.cuda.is_available():
        monkeypatch.setattr(captured, "graph", lambda run: (again := Again(run), again.out))
        monkeypatch.setattr(captured, "replayed", replayed_on_cpu)
    yield
    captured._graphs.clear()
    captured._seen.clear()


def replayed_on_cpu(key, where, capture, *arguments):
    if key not in captured._seen:
        captured._seen[key] = None
        return None
    if key not in captured._graphs:
        captured._graphs[key] = capture()
    return captured._graphs[key](*arguments)


def drawn(device, dtype=torch.float32, nan=False):
    scores = torch.randn(LAYERS, HEADS, TOKENS)
    if nan:
        scores[1, 1, 50] = float("nan")
    sides = [[torch.randn(HEADS, TOKENS, DIM).to(device, dtype) for _ in range(LAYERS)] for _ in range(2)]
    return scores.to(device), *sides


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_what_is_kept_is_what_selection_keeps_and_its_own(device, dtype):
    results = []
    for turn in range(4):  # not captured, captured, replayed twice
        scores, keys, values = drawn(device, dtype)
        found = kept(scores, keys, values, BUDGET)
        if turn == 0:
            assert found is None
            continue
        found.wait()
        want = [select(s, BUDGET) for s in scores.cpu()]
        results.append((found, want, keys, values))
    assert len(captured._graphs) == 1
    for found, want, keys, values in results:  # after the graph has written other results
        np.testing.assert_array_equal(found.positions, np.stack(want))
        assert torch.equal(found.tokens.cpu(), torch.stack(want))
        for layer, chosen in enumerate(want):
            for got, source in ((found.keys, keys), (found.values, values)):
                assert got[layer].shape == (1, HEADS, BUDGET.tokens, DIM)
                assert torch.equal(got[layer][0].cpu(), rows(source[layer].cpu(), chosen))


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks keys up by their addresses on the host")
def test_scores_of_a_pass_are_of_the_keys_that_lie_where_it_is_told(device):
    known = {}

    def scored(where):
        return torch.stack([known[int(x)].norm(dim=-1) for x in where[:LAYERS]]).view(LAYERS * HEADS, TOKENS)

    norms = captured.Pass("norms", scored, list)
    for turn in range(3):
        _, keys, values = drawn(device)
        known |= {k.data_ptr(): k for k in keys}
        found = kept(norms, keys, values, BUDGET)
        if turn:
            want = torch.stack([select(k.norm(dim=-1), BUDGET) for k in keys])
            np.testing.assert_array_equal(found.positions, want)
            assert torch.equal(found.values[1][0], rows(values[1], want[1]))
    assert kept(captured.Pass("others", scored, list), keys, values, BUDGET) is None, "a graph is of one pass"


@pytest.mark.slow
@pytest.mark.parametrize("scorer", [Wavelet(), Fourier()])
def test_a_pass_over_the_keys_is_part_of_the_same_graph(monkeypatch, device, scorer):
    """Other keys and values at every turn, of which scores are those of the scorer."""
    monkeypatch.setattr(together, "_on_gpu", lambda x: True)
    rope, budget, tokens = Rope(10_000.0 ** -(np.arange(8) / 8)), Budget(300, 3, 20), 1024
    results = []
    for turn in range(3):  # not captured, captured, replayed
        keys, values = ([torch.randn(1, tokens, DIM).to(device) for _ in range(2)] for _ in range(2))
        views = [LayerView(k, k, rope, np.arange(tokens), budget.evictable(tokens), scaling=1) for k in keys]
        found = kept(together.pass_over_keys(scorer, views[0], keys), keys, values, budget)
        if turn == 0:
            assert found is None
            continue
        found.wait()
        results.append((found, [select(scorer.score(view), budget).cpu() for view in views], keys, values))
    assert len(captured._graphs) == 1
    for found, want, keys, values in results:
        np.testing.assert_array_equal(found.positions, np.stack(want))
        for layer, chosen in enumerate(want):
            for got, source in ((found.keys, keys), (found.values, values)):
                assert torch.equal(got[layer][0].cpu(), rows(source[layer].cpu(), chosen))


def test_a_pass_is_for_scorers_with_kernels_alone(monkeypatch):
    keys = [torch.randn(1, 1024, DIM)]
    rope, span = Rope(10_000.0 ** -(np.arange(8) / 8)), slice(3, 1000)
    view = LayerView(keys[0], keys[0], rope, np.arange(1024), span, scaling=1)
    assert together.pass_over_keys(Wavelet(), view, keys) is None, "on a CPU"
    monkeypatch.setattr(together, "_on_gpu", lambda x: True)
    assert together.pass_over_keys(Knorm(), view, keys) is None
    assert together.pass_over_keys(Wavelet(signal="values"), view, keys) is None
    passes = [together.pass_over_keys(s, view, keys).key for s in (Wavelet(), Wavelet(), Wavelet(recency_weight=0.3))]
    assert passes[0] == passes[1] != passes[2]


def test_scores_that_are_no_numbers_are_refused_once_they_decide(device):
    for _ in range(2):
        found = kept(*drawn(device), BUDGET)
    found.wait()
    with pytest.raises(ValueError, match="NaN"):
        kept(*drawn(device, nan=True), BUDGET).wait()
    scores, keys, values = drawn(device)
    scores[:, :, :3] = float("nan")  # of sinks, which nobody asks
    kept(scores, keys, values, BUDGET).wait()
    kept(*drawn(device), BUDGET).wait()


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (Budget(TOKENS, 3, 20), "nothing to choose"),
        (Budget(70, 3, 20, allocation="head"), "not as many in every head"),
        (Budget(70, 3, 20, selection="per_head"), "heads of all layers together"),
    ],
)
def test_what_one_graph_does_not_do(device, budget, why):
    given = drawn(device)
    assert [kept(*given, budget) for _ in range(3)] == [None] * 3, why


def test_a_graph_is_for_what_it_was_captured_of_alone(monkeypatch, device):
    """Numbers of tokens to choose, windows, dtypes and shapes have graphs of their own."""
    asked = []
    monkeypatch.setattr(captured, "replayed", lambda key, *others: asked.append(key))
    scores, keys, values = drawn(device)
    for budget in (BUDGET, Budget(71, 3, 20), Budget(71, 4, 20), Budget(71, 3, 21), BUDGET):
        kept(scores, keys, values, budget)
    kept(scores, *([x.half() for x in kind] for kind in (keys, values)), BUDGET)
    kept(scores[:2], keys[:2], values[:2], BUDGET)
    kept(scores[:, :, :299].contiguous(), *([x[:, :299].contiguous() for x in kind] for kind in (keys, values)), BUDGET)
    assert len(asked) == 8 and len(set(asked)) == 7


def test_a_graph_captured_in_inference_mode_serves_outside_of_it(monkeypatch):
    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    buffer = []
    for mode in (True, True, False):
        with torch.inference_mode(mode):
            found = REPLAYED(
                "a", torch.zeros(1), lambda: buffer.append(torch.zeros(1)) or buffer[0].copy_, torch.ones(1)
            )
    assert found == 1 and len(buffer) == 1


def test_large_results_and_odd_layouts_are_left_to_others(monkeypatch, device):
    scores, keys, values = drawn(device)
    odd = [k.mT.contiguous().mT for k in keys]
    assert [kept(scores, odd, values, BUDGET) for _ in range(3)] == [None] * 3
    monkeypatch.setattr(captured, "LARGEST", 1000)
    assert [kept(scores, keys, values, BUDGET) for _ in range(3)] == [None] * 3
