"""What benchmarks leave behind, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import codec_results, decoding

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_report_goes_into_outputs_alone(tmp_path):
    """In a process of its own: MLflow remembers where it wrote."""
    code = "from benchmarks import clock; clock.report('some', [{'a': 1, 'b': 0.5}], 'some.csv')"
    for _ in range(2):
        told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                              check=True, capture_output=True, text=True)  # fmt: skip
    assert "| 1 | 0.5 |" in told.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", "some.csv"]
    assert len(list((tmp_path / "outputs" / "artifacts").rglob("some.json"))) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--sizes", "64x1"], "--kept"), (["--sizes", "4096x1,130x1", "--kept", "100"], "none is in codes")],
)
def test_decoding_refuses_sizes_without_anything_to_compare(monkeypatch, capsys, given, message):
    monkeypatch.setattr("sys.argv", ["decoding", *given])
    with pytest.raises(SystemExit):
        decoding.main()
    assert message in capsys.readouterr().err


def test_the_best_rival_of_a_codec_has_its_bytes_and_its_windows():
    about = [*"model text tokens count method allocation storage smaller".split(), "ppl/kl", "document.continuation"]
    rows = {
        "coder": ["small", "novel", 4096, 10, "full", "uniform", "spectral", 8.0, 0.002, 257],
        "other coder": ["small", "novel", 4096, 10, "full", "uniform", "spectral_at_rest", 8.1, 0.001, 257],
        "larger": ["small", "novel", 4096, 10, "full", "uniform", "turboquant_3bit", 4.4, 0.003, 257],
        "worse": ["small", "novel", 4096, 10, "streaming", "uniform", "dense", 8.0, 0.3, 257],
        "best": ["small", "novel", 4096, 10, "streaming", "uniform", "turboquant_3bit", 8.4, 0.05, 257],
        "other text": ["small", "manual", 4096, 10, "streaming", "uniform", "turboquant_3bit", 8.0, 0.01, 257],
        "two bits": ["small", "novel", 4096, 10, "kvzip", "global", "turboquant_2bit", 7.6, 0.06, 257],
        "longer": ["small", "novel", 4096, 10, "streaming", "uniform", "turboquant_2bit", 8.0, 0.02, 640],
    }
    table = pd.DataFrame(rows, index=about).T.infer_objects()
    spread = np.linspace(0.9, 1.1, 10)
    windows = pd.DataFrame({run: row[-2] * spread for run, row in rows.items()}).T
    assert sorted(codec_results.rivals("coder", table, windows).index) == ["best", "two bits", "worse"]
    recall, full = (pd.DataFrame({"coder": x}).T for x in ([0.75, 1.0] * 5, [1.0] * 10))
    by_document = {"ppl/kl": windows, "retrieval/recall": recall, "retrieval/full_recall": full}
    line = next(x for x in codec_results.markdown(table, by_document).splitlines() if "| spectral |" in x)
    assert "-0.0230 [-0.02" in line  # .002 - .05 / 2, on the same windows
    assert "| streaming, uniform, turboquant_3bit | 3 |" in line
    assert "-0.075 [-0.1" in line  # .875 found on average, .95 of what the full cache finds


def test_tables_of_a_codec_make_no_store_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["codec_results", str(tmp_path / "mlflow.db"), "--out", str(tmp_path / "codec")])
    with pytest.raises(SystemExit):
        codec_results.main()
    assert "mlflow.db is no file" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_runs_of_a_codec_with_other_settings_stay_apart_and_the_newest_of_the_same_counts(monkeypatch, tmp_path):
    about = {
        "model.name": "small", "document.name": "novel", "document.tokens": "4096", "document.continuation": "257",
        "document.count": "10", "method.name": "streaming", "budget.allocation": "uniform", "budget.resolved": "512",
        "storage.name": "dense", "storage.ratio": "None", "budget.ratio": "None", "backend.dtype": "float32",
    }  # fmt: skip
    other = {
        "budget.resolved": "1024", "document.continuation": "641", "backend.dtype": "bfloat16", "storage.along": "64",
        "storage.bases": "/some/where/ten_layers.safetensors",
    }  # fmt: skip
    runs = [about, about, *({**about, name: value} for name, value in other.items())]
    found = pd.DataFrame([{f"params.{name}": value for name, value in run.items()} for run in runs])
    found = found.assign(run_id=list("abcdefg"), start_time=range(7), artifact_uri="", **{"metrics.memory/ratio": 8.0})
    monkeypatch.setattr(codec_results.mlflow, "set_tracking_uri", lambda uri: None)
    monkeypatch.setattr(codec_results.mlflow, "search_runs", lambda **asked: found[::-1])
    table, by_document = codec_results.collected([tmp_path])
    assert list(table.index) == list("bcdefg") and all(windows.empty for windows in by_document.values())
    assert table.loc["g", "storage.bases"] == "ten_layers.safetensors"


def test_tables_of_a_codec_read_a_store_that_was_moved(monkeypatch, tmp_path):
    about = {"model.name": "small", "document.name": "novel", "document.tokens": "4096", "document.count": "2",
             "method.name": "full", "budget.allocation": "uniform", "storage.name": "spectral"}  # fmt: skip
    found = pd.DataFrame([{f"params.{name}": value for name, value in about.items()}])
    found = found.assign(run_id="a", start_time=0, artifact_uri="/gone/a/artifacts",
                         **{"metrics.memory/ratio": 8.0, "metrics.ppl/kl": 0.3})  # fmt: skip
    monkeypatch.setattr(codec_results.mlflow, "set_tracking_uri", lambda uri: None)
    monkeypatch.setattr(codec_results.mlflow, "search_runs", lambda **asked: found)
    rows = [[0, None, None, "ppl/kl", 0.2], [1, None, None, "ppl/kl", 0.4]]
    written = {"columns": ["document", "layer", "turn", "metric", "value"], "data": rows}
    (folder := tmp_path / "artifacts" / "a" / "artifacts").mkdir(parents=True)
    (folder / "rows.json").write_text(json.dumps(written))
    _, by_document = codec_results.collected([tmp_path / "mlflow.db"])
    assert by_document["ppl/kl"].loc["a"].tolist() == [0.2, 0.4]
