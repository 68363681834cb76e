"""Tables of methods and allocations: what is tested together, what is marked, what is left out."""

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.rivals import Setting, markdown, table
from pipeline.paper.finished import FinishedRun

WINDOWS = 8
NOISE = np.random.default_rng(0).normal(0, 0.01, WINDOWS)


def finished(metric, values, **tags):
    rows = [[i, None, None, None, metric, float(v)] for i, v in enumerate(values)]
    text = json.dumps({"columns": ["document", "layer", "turn", "depth", "metric", "value"], "data": rows})
    about = {"method": "m", "title": tags["title"], "hash.document": "d", "hash.code": "c", "hardware": "card"}
    metrics = {metric: float(np.mean(values)), f"{metric}_low": 0.0, f"{metric}_high": 1.0}
    return FinishedRun("r", {}, WINDOWS, metrics | tags.get("more", {}), about, lambda: text)


@pytest.fixture
def runs():
    """Two models; on the second one the full cache finds half of what is asked for."""
    found = {}
    for model, full in (("one", 0.9), ("other", 0.5)):
        for method, allocation, kl, recall in (
            ("streaming", "uniform", 0.5 + NOISE, 0.1 + NOISE),
            ("kvzip", "uniform", 0.5 + NOISE[::-1], 0.1 + NOISE[::-1]),
            ("kvzip", "global", 0.2 + NOISE[::-1] * 1.1, 0.8 + NOISE * 1.1),
        ):
            for kind, metric, values in (("pydoc", "ppl/kl", kl), ("needles", "retrieval/recall", recall)):
                more = {"retrieval/full_recall": full} if kind == "needles" else {}
                task = {"document.task": "single"} if kind == "needles" else {}
                setting = Setting((model, kind, "512"), method, "1", allocation, "none")
                params = {"model.name": model, "document.name": kind, "document.tokens": "4096"} | task
                params["budget.resolved"] = "512"
                found[setting] = finished(metric, values, title=method.title(), more=more), params
    return found


def test_differences_are_paired_and_holm_goes_over_a_model(runs):
    found = table(runs)
    line = found[(found.model == "one") & (found.metric == "ppl/kl") & (found.allocation == "global")].iloc[0]
    assert line.vs_uniform == pytest.approx(-0.3, abs=0.005) and line.vs_uniform_high < 0
    assert line.vs_streaming_tests == 2 and line.vs_streaming_holm == pytest.approx(2 * line.vs_streaming_p)
    assert line.vs_uniform_tests == 1 and line.vs_uniform_holm == line.vs_uniform_p
    assert found[found.method == "Streaming"].vs_streaming.isna().all()
    assert found[(found.model == "other") & (found.metric == "retrieval/recall")].vs_streaming_holm.isna().all()


def test_what_is_within_its_margin_is_equal(runs):
    uniform = next(
        s for s in runs if s.method == "kvzip" and s.allocation == "uniform" and s.place[:2] == ("one", "pydoc")
    )
    near = runs[uniform][0].documents["ppl/kl"].to_numpy() + NOISE / 100
    layer = Setting(uniform.place, "kvzip", "1", "layer", "none")
    runs[layer] = finished("ppl/kl", near, title="Kvzip"), runs[uniform][1]
    found = table(runs)
    line = found[(found.allocation == "layer") & (found.metric == "ppl/kl")].iloc[0]
    assert (
        line.vs_uniform_equal_holm == pytest.approx(2 * line.vs_uniform_equal_p) and line.vs_uniform_equal_holm < 0.05
    )
    assert any(x.split("|")[2].strip().endswith("=") for x in markdown(found).splitlines() if x.startswith("| Kvzip "))


def test_what_is_decided_has_a_star_and_what_the_model_fails_no_table(runs):
    text = markdown(table(runs))
    _, _, uniform, shared_out, _ = next(x for x in text.splitlines() if x.startswith("| Kvzip ")).split("|")
    assert "*" not in uniform and shared_out.strip().endswith("[0.000, 1.000] *")
    assert "one: recall of planted facts" in text and "other: recall" not in text
    assert "single, other, 8 windows: the full cache finds 0.50, left out" in text
    recall = text[text.index("one: recall") :]
    beside, own = (
        next(x for x in part.splitlines() if x.startswith("| Kvzip, global")) for part in recall.split("Difference")[1:]
    )
    assert "+0.70" in beside and "*" in beside and "+0.70" in own


def test_a_refit_is_beside_the_same_tokens_alone(runs):
    plain = Setting(("one", "pydoc", "512"), "streaming", "1", "uniform", "none")
    params = runs[plain][1]
    runs[Setting(plain.place, "streaming", "1", "uniform", "bias")] = (
        finished("ppl/kl", 0.4 + NOISE * 1.1, title="Streaming"), params,
    )  # fmt: skip
    found = table(runs)
    line = found[found.refit == "bias"].iloc[0]
    assert line.vs_no_refit == pytest.approx(-0.1, abs=0.005) and pd.isna(line.vs_streaming)
    assert "one: refits" in markdown(found) and "-0.10" in markdown(found)
