"""Runs as pandas frames, by the public functions."""

import pandas as pd
import pytest

import pipeline
from pipeline.settings.errors import InputError


def test_runs_and_their_rows_as_frames(run, small):
    outputs = next(o for o in small if o.startswith("outputs="))
    found = {result.run_id: result for result in (run("method=streaming"), run("method=snapkv", "budget.tokens=100"))}
    frame = pipeline.runs(outputs)
    assert list(frame.index) == list(found)
    for run_id, result in found.items():
        assert frame.loc[run_id, "title"] == result.title
        assert frame.loc[run_id, "ppl/kl"] == result.metrics["ppl/kl"]
        assert frame.loc[run_id, "budget.resolved"] == result.budget  # a number
    assert frame["started"].is_monotonic_increasing and str(frame["started"].dt.tz) == "UTC"
    assert list(pipeline.runs(outputs, "method=snapkv")["method.name"]) == ["snapkv"]
    run("method=full")
    every = pipeline.runs(outputs)  # all 200 tokens of the prompt are a number, too
    assert every["budget.resolved"].tolist() == [60, 100, 200]
    assert every.pivot_table(columns="budget.resolved", values="ppl/kl").columns.tolist() == [60, 100, 200]

    rows = pipeline.rows(frame)
    whole = rows[(rows["metric"] == "ppl/kl") & rows["layer"].isna()]
    means = whole.groupby("run_id")["value"].mean()
    for run_id, result in found.items():
        assert means[run_id] == pytest.approx(result.metrics["ppl/kl"])
    assert set(rows.loc[rows["metric"] == "aop/mean", "layer"].dropna()) == {0, 1}
    assert set(rows["title"]) == {result.title for result in found.values()}


def test_rows_are_of_the_store_that_a_frame_is_from(run, small, small_in, tmp_path):
    outputs = next(o for o in small if o.startswith("outputs="))
    kept = run("method=streaming")
    frame = pipeline.runs(outputs)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = next(o for o in small_in(elsewhere) if o.startswith("outputs="))
    assert pipeline.runs(other).empty  # another store is the one that was opened last
    assert set(pipeline.rows(frame)["run_id"]) == {kept.run_id}
    assert set(pipeline.rows(frame[frame["ppl/kl"] >= 0])["title"]) == {"StreamingLLM"}
    foreign = pd.DataFrame({"title": ["x"]}, index=["0123456789abcdef"])
    with pytest.raises(InputError, match="does not say which store it is from"):
        pipeline.rows(foreign)
    mixed = pd.concat([frame[["title"]], foreign])
    mixed.attrs = frame.attrs
    with pytest.raises(InputError, match="run 0123456789abcdef is not in the store of"):
        pipeline.rows(mixed)


def test_nothing_fits_and_nothing_is_there(run, small, tmp_path):
    outputs = next(o for o in small if o.startswith("outputs="))
    run("method=streaming")
    empty = pipeline.runs(outputs, "method=tri")
    assert isinstance(empty, pd.DataFrame) and empty.empty and pipeline.rows(empty).empty
    with pytest.raises(InputError, match="there is no store at"):
        pipeline.runs(f"outputs={tmp_path / 'elsewhere'}")
