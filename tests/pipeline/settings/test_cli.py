import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline.settings.cli as cli


def pipeline(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and last line on standard error of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return end.value.code, lines[0]


def imported_by(*arguments: str, status: int = 0) -> tuple[str, set[str]]:
    """What a call prints, and the top-level names of all modules that it imports."""
    code = (
        f"import atexit, sys; sys.argv = ['pipeline', *{arguments!r}]\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from pipeline.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout, set(done.stderr.split())


HEAVY = {"torch", "transformers", "mlflow", "pandas", "scipy", "numpy", "tokenizers", "spectral_kv"}


def test_help_is_a_manual_and_imports_little():
    """Hydra alone would take most of a second, numpy a quarter of one."""
    text, modules = imported_by("--help")
    for words in ("* wavelet_tri", "method.levels: 4", "budget.recent: 64", "last tokens, always kept", "Examples"):
        assert words in text
    assert not modules & (HEAVY | {"hydra", "omegaconf"})
    assert len(modules) < 150


def test_the_configuration_is_printed_by_hydra_and_its_own_imports():
    text, modules = imported_by("--cfg", "job", "method=tri")
    assert "largest_offset: 65536" in text
    assert not modules & HEAVY
    assert len(modules) < 500


@pytest.mark.parametrize("setting", ["tracking.uri=http://localhost:9", "seed=1"])
def test_a_store_that_can_not_be_used_is_refused_before_frameworks_are_imported(tmp_path, setting):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 999)
    _, said = imported_by(f"outputs={tmp_path}", setting, "document.count=1", status=2)
    assert not said & {"torch", "transformers", "mlflow", "pandas"}
    assert "tracking.uri=null" in said if "uri" in setting else "mlflow.db" in " ".join(said)


@pytest.mark.slow
def test_a_sweep_on_the_command_line_gives_a_finished_run_a_budget(small):
    import mlflow

    overrides = [o for o in small if not o.startswith("budget.tokens")]
    result = pipeline(*overrides, "method=wavelet_tri", "budget=60,100", "-m")
    assert result.returncode == 0, result.stderr
    outputs = next(o for o in small if o.startswith("outputs=")).removeprefix("outputs=")
    mlflow.set_tracking_uri(f"sqlite:///{outputs}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["spectral-kv"]).sort_values("start_time")
    assert runs["status"].tolist() == ["FINISHED"] * 3
    runs = runs[runs["tags.runs"].isna()]  # without the one above the sweep
    assert runs["metrics.memory/bytes"].tolist() == [60 * 256, 100 * 256]
    assert runs["metrics.prefill/computed"].tolist() == [3, 0]
    for run_id in runs["run_id"]:
        assert f"MLflow run {run_id}" in result.stdout
    assert f"mlflow ui --backend-store-uri sqlite:///{outputs}/mlflow.db" in result.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["method=nope"], ["method=nope", "wavelet_tri"]),
        (["method.levles=3"], ["method.levles", "did you mean method.levels?"]),
        (["method=["], ["method=["]),
        (["budget=0"], ["budget.tokens=0", "at least 69"]),
        (["document.count=400"], ["document.count=400"]),
        (["model.path=/nowhere"], ["model.path=/nowhere"]),
        (["foo=1"], ["foo is not a setting"]),
    ],
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    status, line = call(monkeypatch, capsys, f"outputs={tmp_path}", *arguments)
    assert status == 2
    for word in words:
        assert word in line


def test_an_unwritable_outputs_folder_is_one_sentence(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, line = call(monkeypatch, capsys, f"outputs={tmp_path / 'file'}")
    assert status == 2
    assert f"outputs={tmp_path / 'file'} can't be written to" in line


def test_bad_input_leaves_no_run(monkeypatch, capsys, tmp_path):
    call(monkeypatch, capsys, f"outputs={tmp_path}", "budget=0")
    assert not (tmp_path / "mlflow.db").exists()


def test_one_bad_job_does_not_stop_the_others(small, monkeypatch, capsys):
    overrides = [o for o in small if not o.startswith("budget.tokens")]
    monkeypatch.setattr(sys, "argv", ["pipeline", *overrides, "method=random", "budget=0,60", "-m"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.err.count("budget.tokens=0 leaves nothing to choose") == 1
    assert printed.out.count("MLflow run") == 1


def test_tracebacks_on_request(tmp_path):
    result = pipeline(f"outputs={tmp_path}", "budget=0", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "InputError" in result.stderr


@pytest.mark.parametrize("preset", [[], ["experiment=paper"]])
def test_the_model_is_the_outermost_loop_whatever_the_order(monkeypatch, capsys, tmp_path, preset):
    """Every job is refused, by a sentence that names its model: their order is that of the jobs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lengths = "9000" if preset else "9000,10000"  # a preset has its own order for the rest
    swept = ["method=random,streaming", f"document.tokens={lengths}", "model=qwen2_5_0_5b,reference", "-m"]
    monkeypatch.setattr(sys, "argv", ["pipeline", f"outputs={tmp_path}", *preset, *swept])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pipeline: ")]
    half = 2 if preset else 4
    assert end.value.code == 2 and len(lines) == 2 * half
    assert all("Qwen" in line for line in lines[:half]) and all("model=reference" in line for line in lines[half:])
    if not preset:
        assert ["9000" in line for line in lines[4:]] == [True, True, False, False]


def test_a_folder_of_its_own_for_every_job_keeps_one_store(small, tmp_path, monkeypatch, capsys):
    """With hydra.job.chdir relative outputs still count from where the command was given."""
    outputs = Path(next(o for o in small if o.startswith("outputs=")).removeprefix("outputs="))
    monkeypatch.chdir(tmp_path)
    settings = [o for o in small if not o.startswith(("outputs=", "phase."))]
    arguments = ["outputs=outputs", "hydra.job.chdir=true", "phase=memory", "method=random"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *settings, *arguments])
    cli.main()
    assert [path.parent for path in tmp_path.rglob("mlflow.db")] == [outputs]
    assert len(list((outputs / "artifacts").iterdir())) == 1
    assert f"sqlite:///{outputs}/mlflow.db" in capsys.readouterr().out
    os.chdir(tmp_path)
