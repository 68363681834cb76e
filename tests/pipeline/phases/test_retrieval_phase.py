"""The retrieval phase: on what was said, on the small model, and on the reference model, which can look things up."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.compare import documents
from pipeline.documents.base import Asked
from pipeline.job import prepare
from pipeline.phases.base import Context
from pipeline.phases.retrieval import Retrieval
from pipeline.run import execute, measure
from pipeline.settings.compose import composed
from pipeline.show.summary import show
from pipeline.stages.compress import Compressed
from pipeline.stages.prefill import FullRun, FullRuns
from pipeline.statistics import aggregate
from spectral_kv.storage.dense import Dense

NEEDLES = ["document=needles", "phase=retrieval", "document.continuation=60"]
REFERENCE = [*NEEDLES, "document.tokens=384", "document.count=5", "document.planted=1", "document.questions=1"]


def context(ours: list[list[int]], theirs: list[list[int]]) -> Context:
    """A context whose caches say these tokens one after the other; every answer is 1, 2."""
    said = iter(ours)
    lookups = [Asked(np.array([i]), np.array([1, 2]), i / 10) for i in range(len(ours))]
    backend = SimpleNamespace(generate=lambda cache, token, count: next(said))
    full = SimpleNamespace(answer=lambda question, count: theirs[question[0]])
    compressed = Compressed(SimpleNamespace(copy=lambda: None), None, 0.0)
    return Context(backend, full, compressed, None, 0, lookups)


def whole(rows: list[dict]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows if "depth" not in row}


def test_an_answer_counts_if_all_of_it_is_right():
    rows = Retrieval().measure(context([[1, 2], [1, 3], [9, 2], [1, 2]], [[1, 2], [1, 2], [1, 2], [2, 1]]))
    assert whole(rows) == {
        "retrieval/recall": 0.5,
        "retrieval/full_recall": 0.75,
        "retrieval/answerable": pytest.approx(1 / 3),
    }
    deep = [(row["depth"], row["metric"], row["value"]) for row in rows if "depth" in row]
    assert len(deep) == 8 and {d for d, _, _ in deep} == {0, 0.1, 0.2, 0.3}
    assert (0.1, "retrieval/recall", 0.0) in deep and (0.1, "retrieval/full_recall", 1.0) in deep
    assert (0.3, "retrieval/recall", 1.0) in deep and (0.3, "retrieval/full_recall", 0.0) in deep


def test_where_the_full_cache_knows_nothing_there_is_no_recall_of_what_it_knows():
    assert whole(Retrieval().measure(context([[1, 2]], [[3, 3]]))) == {
        "retrieval/recall": 1.0,
        "retrieval/full_recall": 0.0,
    }


def test_rows_with_a_depth_are_not_whole_documents():
    rows = pd.DataFrame(
        [{"document": 0, "metric": "x", "value": 1.0}, {"document": 0, "depth": 0.5, "metric": "x", "value": 9.0}]
    )
    assert aggregate(rows)["x"].mean == 1


def test_the_full_cache_says_what_plain_decoding_says_and_is_asked_once(backend, rng, monkeypatch):
    window = rng.integers(2, 8000, size=140)
    full = FullRun(backend, window, 120, observe=1)
    for question in (rng.integers(2, 8000, size=9), rng.integers(2, 8000, size=1)):
        tokens = np.concatenate([window[:120], question]).tolist()
        for _ in range(5):
            tokens.append(int(backend.prefill(np.array(tokens), 1).logits.argmax()))
        assert full.answer(question, 5) == tokens[-5:]
    monkeypatch.setattr(backend, "generate", None)  # not needed any more
    assert full.answer(question, 5) == tokens[-5:]
    assert np.array_equal(full.prefill.tokens, window[:120]) and full.prefill.keys[0].shape[1] == 120


def test_answers_of_the_full_cache_are_shared_by_the_jobs_of_a_process(backend, rng):
    window, runs = rng.integers(2, 8000, size=60), FullRuns()
    first, scores, _ = runs.get(("x",), backend, window, 50, 1, limit=10**9)
    said = first.answer(window[:3], 2)
    again, same, origin = runs.get(("x",), backend, window, 50, 1, limit=10**9)
    assert origin == "reused" and same is scores and again.answer(window[:3], 2) is said


def test_a_question_is_asked_of_a_copy(backend, rng):
    """The second question does not see the first."""
    full = FullRun(backend, rng.integers(2, 8000, size=60), 50, observe=1)
    cache = backend.compress(full.prefill, None, Dense())
    one, two = (Asked(rng.integers(2, 8000, size=6), np.array([1, 2]), 0.5) for _ in range(2))
    seen = []
    extend = backend.extend
    spy = SimpleNamespace(
        extend=lambda cache, tokens: (seen.append(cache.position), extend(cache, tokens))[1], generate=backend.generate
    )
    Retrieval().measure(Context(spy, full, Compressed(cache, None, 0.0), None, 0, [one, two]))
    assert seen == [50, 50] and cache.position == 50


def test_a_model_that_finds_nothing_is_warned_of(small, capsys):
    settings = [o for o in small if not o.startswith("phase.")]
    result = execute(prepare(composed([*settings, *NEEDLES, "document.tokens=400", "method=streaming"])))
    assert result.metrics["retrieval/full_recall"] == 0 and "retrieval/answerable" not in result.metrics
    show(result)
    assert "the full cache itself finds only 0%" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Rows of a configuration on the reference model."""
    folder = tmp_path_factory.mktemp("outputs")
    return lambda *overrides: measure(prepare(composed([*REFERENCE, f"outputs={folder}", *overrides]))).rows


def recall(rows: pd.DataFrame, metric: str = "retrieval/recall") -> pd.Series:
    """By depth, ascending."""
    return rows[(rows["metric"] == metric) & rows["depth"].notna()].set_index("depth")["value"].sort_index()


@pytest.mark.slow
def test_the_full_cache_finds_needles_and_a_window_loses_those_before_it(found):
    full = found("method=full")
    theirs = recall(full, "retrieval/full_recall")
    assert len(theirs) == 5 and theirs.mean() >= 0.9
    pd.testing.assert_series_equal(recall(full), theirs)

    window = recall(found("method=streaming", "budget=128"))  # 4 sinks and the last 124 tokens, from 260 on
    starts = 1 + window.index * (384 - 1 - 22)  # a needle takes about 22 tokens
    assert sum(starts < 230) >= 2 and (window[starts < 230] == 0).all()
    assert sum(starts > 265) >= 1 and (window[starts > 265] == 1).all()

    everything = recall(found("method=streaming", "budget=384"))
    pd.testing.assert_series_equal(everything, theirs)


@pytest.mark.slow
def test_a_method_that_follows_attention_finds_what_a_visible_question_looks_for(found):
    settings = ["method=tova", "budget=160", "budget.recent=16"]
    hidden, visible = found(*settings), found(*settings, "document.visible=true")
    assert recall(visible, "retrieval/full_recall").mean() >= 0.9
    assert recall(hidden).mean() <= 0.2 and recall(visible).mean() >= 0.6


def test_a_run_is_recorded_by_document_and_by_depth(small, tmp_path):
    outputs = next(o for o in small if o.startswith("outputs="))
    result = execute(prepare(composed([*REFERENCE, outputs, "document.count=2", "document.tokens=256", "method=full"])))
    metrics = result.metrics
    assert metrics["retrieval/recall"] == metrics["retrieval/full_recall"] > 0 and metrics["retrieval/answerable"] == 1
    table = documents(result)  # as MLflow holds them, without the rows by depth
    assert table["retrieval/recall"].mean() == metrics["retrieval/recall"] and len(table) == 2


def test_what_an_answer_reads_is_the_model_s_own_attention(backend, checkpoint, rng):
    """Weights of transformers' eager attention over prompt, question and answer, as shares of the prompt's."""
    from transformers import AutoModelForCausalLM

    tokens, question, answer, places = rng.integers(2, 8000, size=60), *np.split(np.arange(12) + 100, [8]), [20, 21, 25]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype="float32")
    ids = torch.as_tensor(np.concatenate([tokens, question, answer[:-1]]))[None]
    attentions = model(ids, output_attentions=True).attentions
    expected = []
    for layer in attentions:  # [1, query_heads, tokens, tokens]; two query heads a KV head
        weights = layer[0, :, -len(answer) :, :60].double()
        weights = weights / weights.sum(-1, keepdim=True)
        expected.append(weights.mean(1).reshape(2, 2, 60).mean(1)[:, places].detach().numpy())
    expected = np.stack(expected)

    full = FullRun(backend, np.concatenate([tokens, tokens]), 60, observe=1)
    kept = [np.tile(np.arange(60), (2, 1))[:, :22], np.stack([np.arange(38, 60), np.arange(4, 26)])]
    cache = backend.compress(full.prefill, [torch.as_tensor(x) for x in kept], Dense())
    asked = Asked(question, answer, 0.5, np.array(places))
    rows = Retrieval().measure(Context(backend, full, Compressed(cache, kept, 0.0), None, 0, [asked]))
    found = whole([row for row in rows if "layer" not in row])
    chosen = np.array([[[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]])
    assert found["retrieval/mass"] == pytest.approx(expected.sum(-1).mean(), rel=1e-4)
    assert found["retrieval/kept"] == pytest.approx(chosen.mean())
    assert found["retrieval/gone_everywhere"] == pytest.approx(1 - chosen.any(axis=(0, 1)).mean())
    assert found["retrieval/mass_kept"] == pytest.approx((expected * chosen).sum() / expected.sum(), rel=1e-4)
    by_head = {(r["layer"], r["head"]): r["value"] for r in rows if r["metric"] == "retrieval/mass" and "head" in r}
    assert by_head[1, 0] == pytest.approx(expected[1, 0].sum(), rel=1e-4) and len(by_head) == 4
