"""Jobs on several processes and machines: presets compose, and workers find what one process finds."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from pipeline.settings.compose import composed
from pipeline.settings.folders import conf_dir
from pipeline.store import tracking
from pipeline.store.search import chosen, opened

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


def above_and_below(outputs: Path) -> tuple:
    """The run above a sweep, and its own."""
    mlflow, _, _ = opened([f"outputs={outputs}"])
    found = tracking.runs(mlflow)
    (above,) = (run for run in found if tracking.PARENT in run.data.tags)
    return above, [run for run in found if run is not above]


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
    above, below = above_and_below(tmp_path / "together")
    assert above.info.status == "FINISHED"
    assert above.data.tags["process.pid"] not in {run.data.tags["process.pid"] for run in below}  # of the command


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


SLURM = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=3
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def ports(count: int) -> list[int]:
    """Ports that nobody uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def slurm(tmp_path):
    """A cluster of one node, this machine, by the daemons of Debian's packages: runs a command of its clients."""
    if not (shutil.which("slurmctld") and shutil.which("slurmd")):
        pytest.skip("there is no Slurm: apt-get install slurm-wlm")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs as root alone")
    folder = tmp_path / "slurm"
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    configuration.write_text(SLURM.format(host=socket.gethostname(), folder=folder, ports=ports(2)))
    environment = os.environ | {"SLURM_CONF": str(configuration)}

    def client(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    daemons = [
        subprocess.Popen([name, "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        deadline = time.monotonic() + 60
        while "idle" not in client("sinfo", "--noheader", "--format=%T"):
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
                logs = [path.read_text()[-500:] for path in sorted(folder.glob("*.log"))]
                pytest.skip(f"Slurm does not start here: {logs}")
            time.sleep(0.5)
        client.configuration = str(configuration)
        yield client
    finally:
        client("scancel", "--user=root")
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


@pytest.mark.faults
def test_a_real_slurm_runs_eight_tasks_and_one_that_is_killed_again(slurm, small, tmp_path):
    """An array of eight tasks. One is put back while it runs, which kills it; it finishes at its second start."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    outputs, slow = tmp_path / "o", ["document.count=12", "prefill_memory_gb=0", "prefill_cache_gb=0"]
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens=", "document.count="))]
    command = [
        sys.executable, "-m", "pipeline", *settings, *slow, f"outputs={outputs}", "method=random,snapkv",
        "budget=60,70,80,90", "hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null",
        "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1", "-m",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SLURM_CONF": slurm.configuration}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (running := slurm("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    time.sleep(2)  # it imports, or measures
    slurm("scontrol", "requeue", running[-1])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    runs = chosen([f"outputs={outputs}"])
    assert len(runs) == 8 and len({run.data.tags["process.pid"] for run in runs}) == 8
    assert {run.data.params["budget.resolved"] for run in runs} == {"60", "70", "80", "90"}
    assert "Restarts=1" in slurm("scontrol", "show", "job", running[-1])
    above, _ = above_and_below(outputs)  # it lasts as long as the command that waits, not as long as one of the tasks
    assert above.data.tags["process.pid"] == str(process.pid) and "process.slurm" not in above.data.tags


@pytest.fixture(scope="module")
def ray(tmp_path_factory) -> Path:
    """Python of an environment that has what this one has, and Ray: its plugin holds cloudpickle back."""
    folder = tmp_path_factory.mktemp("ray") / "environment"
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(f"import site; site.addsitedir({str(sysconfig.get_path('purelib'))!r})\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "hydra-ray-launcher>=1.2"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"Ray can't be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


def ray_task(marker: str) -> psutil.Process | None:
    """A process that computes a job for the Ray whose environment has the marker."""
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if "ray::_run_job" in " ".join(process.info["cmdline"] or []) and process.environ().get("MARKER") == marker:
                return process
    return None


@pytest.mark.slow
def test_ray_runs_eight_jobs_and_one_whose_process_is_killed_again(ray, small, tmp_path):
    outputs, slow = tmp_path / "o", ["document.count=12", "prefill_memory_gb=0", "prefill_cache_gb=0"]
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens=", "document.count="))]
    command = [
        ray, "-m", "pipeline", *settings, *slow, f"outputs={outputs}", "method=random,snapkv", "budget=60,70,80,90",
        "hydra/launcher=ray_cluster", "hydra.launcher.ray.init.num_cpus=2", "-m",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MARKER": str(outputs)}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        deadline = time.monotonic() + 300
        while (task := ray_task(str(outputs))) is None:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        time.sleep(2)  # it imports, or measures
        task.kill()
        assert process.wait(600) == 0, (tmp_path / "said").read_text()
    runs = chosen([f"outputs={outputs}"])
    assert {(r.data.params["method.name"], r.data.params["budget.resolved"]) for r in runs} == {
        (method, budget) for method in ("random", "snapkv") for budget in ("60", "70", "80", "90")
    }
    assert len(runs) == 8 and str(task.pid) not in {run.data.tags["process.pid"] for run in runs}


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
