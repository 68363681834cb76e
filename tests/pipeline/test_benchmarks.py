"""What benchmarks leave behind, and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import decoding

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
