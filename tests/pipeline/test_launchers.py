"""Jobs on several processes and machines: presets compose, and workers find what one process finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.settings.compose import composed
from pipeline.settings.folders import conf_dir
from pipeline.store.search import chosen

NUMBERS = ("aop/mean", "ppl/kl", "memory/bytes")

FAKE_SLURM = {
    "sbatch": """#!/bin/bash
script="${@: -1}"
last=$(grep -oP '(?<=--array=0-)[0-9]+' "$script")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=77 SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$task SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 \\
    SLURM_NTASKS=1 SLURM_NNODES=1 bash "$script" > /dev/null 2>&1 &
done
echo "Submitted batch job 77"
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do
  if [[ $1 == --output || $1 == --error ]]; then shift 2; else shift; fi
done
exec "$@"
""",
    "sacct": "#!/bin/bash\necho 'JobID|State|NodeList'\necho '77_0|RUNNING|here'\necho '77_1|RUNNING|here'\n",
}


def sweep(outputs: Path, small: list[str], *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens="))]
    command = [sys.executable, "-m", "pipeline", *settings, f"outputs={outputs}", *overrides, "-m"]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, timeout=600
    )


def numbers(outputs: Path) -> dict[tuple, list[float]]:
    """Metrics of the finished runs by method and budget; a configuration measured twice fails the test."""
    runs = chosen([f"outputs={outputs}"])
    found = {(r.data.params["method.name"], r.data.params["budget.resolved"]): r.data.metrics for r in runs}
    assert len(found) == len(runs)
    return {key: [metrics[name] for name in NUMBERS] for key, metrics in found.items()}


def test_presets_do_not_collide_with_the_plugins():
    names = {path.stem for path in (Path(conf_dir()) / "hydra" / "launcher").glob("*.yaml")}
    assert names == {"local_joblib", "local_gpus", "slurm", "ray_cluster"}
    assert not names & {"joblib", "submitit_local", "submitit_slurm", "ray", "basic"}


@pytest.mark.parametrize("preset, plugin", [("local_joblib", "joblib"), ("slurm", "submitit"), ("ray_cluster", "ray")])
def test_a_preset_composes_or_says_what_to_install(preset, plugin):
    command = [
        sys.executable,
        "-m",
        "pipeline",
        f"hydra/launcher={preset}",
        "--cfg",
        "hydra",
        "--package",
        "hydra.launcher",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode == 0:
        assert f"hydra_{plugin}_launcher" in result.stdout
    else:
        assert "launcher is not installed: pip install 'spectral-kv[" in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_grid_is_swept_inside_one_job(small, monkeypatch, capsys):
    from pipeline.settings import cli

    settings = [o for o in small if not o.startswith("budget.tokens=")]
    grid = 'grid="method=random budget=60,0,100"'  # 0 is refused, the others go on
    monkeypatch.setattr(sys, "argv", ["pipeline", *settings, "seed=1,2", grid, "-m"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.err.count("budget.tokens=0 leaves nothing to choose") == 2
    outputs = next(o for o in small if o.startswith("outputs="))
    found = {
        (r.data.params["seed"], r.data.params["method.name"], r.data.params["budget.resolved"])
        for r in chosen([outputs])
    }
    assert found == {(s, m, b) for s in ("1", "2") for m in ("random",) for b in ("60", "100")}


def test_the_grid_is_not_part_of_the_identity(small):
    from pipeline.job import prepare

    assert prepare(composed([*small, "grid=x"])).digest == prepare(composed(small)).digest


@pytest.mark.faults
def test_four_workers_on_a_fresh_store_find_what_one_process_finds(small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    swept = ["method=random,snapkv,full", "budget=60,100"]  # `full` twice: the second must find the first
    alone = sweep(tmp_path / "alone", small, *swept)
    together = sweep(tmp_path / "together", small, *swept, "hydra/launcher=local_joblib", "hydra.launcher.n_jobs=4")
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    expected = numbers(tmp_path / "alone")
    assert len(expected) == 5 and numbers(tmp_path / "together") == expected


@pytest.mark.faults
def test_local_gpus_gives_every_process_one_of_them(small, tmp_path):
    """Names of GPUs that are not there: the processes compute on the CPU, and their runs say which they had."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    swept = ["method=random,snapkv", "budget=60,80,100"]
    result = sweep(tmp_path / "o", small, *swept, "hydra/launcher=local_gpus", CUDA_VISIBLE_DEVICES="3,5")
    assert result.returncode == 0, result.stderr
    runs = chosen([f"outputs={tmp_path / 'o'}"])
    taken = {(run.data.tags["process.pid"], run.data.tags["process.gpu"]) for run in runs}
    assert len(runs) == 6 and len(taken) == 2 and {gpu for _, gpu in taken} == {"3", "5"}
    nothing = sweep(tmp_path / "p", small, *swept, "hydra/launcher=local_gpus", CUDA_VISIBLE_DEVICES="")
    assert nothing.returncode == 2 and "local_gpus finds no GPU" in nothing.stderr


@pytest.mark.faults
def test_a_job_that_fails_in_a_worker_stops_no_other(small, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    result = sweep(tmp_path / "o", small, "method=random", "budget=0,60,100", "hydra/launcher=local_joblib")
    assert result.returncode == 2 and "budget.tokens=0 leaves nothing to choose" in result.stderr
    assert {budget for _, budget in numbers(tmp_path / "o")} == {"60", "100"}


@pytest.mark.faults
def test_slurm_runs_tasks_with_a_grid_inside(small, checkpoint, tmp_path):
    """Against commands that stand in for a cluster's: what is submitted, and what the tasks leave in the store."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in FAKE_SLURM.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    outputs, grid = tmp_path / "o", 'grid="method=random,snapkv budget=60,100"'
    result = sweep(
        outputs, small, "seed=1,2", grid, "hydra/launcher=slurm", "hydra.launcher.partition=gpu",
        PATH=f"{commands}:{os.environ['PATH']}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    runs = chosen([f"outputs={outputs}"])
    assert len(runs) == 8 and {run.data.tags["process.slurm"] for run in runs} == {"77"}
    assert len({run.data.tags["process.pid"] for run in runs}) == 2
    script = next(outputs.rglob("*submission.sh")).read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--time=240"):
        assert line in script


@pytest.mark.faults
def test_eight_processes_on_a_fresh_store_all_leave_their_runs_and_nothing_elsewhere(small, tmp_path):
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens="))]
    outputs, here = tmp_path / "fresh", tmp_path / "here"
    here.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline", *settings, f"outputs={outputs}", "method=random", f"budget={budget}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=here,
        )
        for budget in range(60, 68)
    ]  # fmt: skip
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, errors
    assert {budget for _, budget in numbers(outputs)} == {str(budget) for budget in range(60, 68)}
    assert list(here.iterdir()) == []  # everything a run writes is in the outputs folder
