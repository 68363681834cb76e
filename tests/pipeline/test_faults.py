"""Sweeps as processes that are killed, interrupted and starved: what is FINISHED is whole, and nothing is lost."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.doctor import examine, repair
from pipeline.settings.config import TrackingConfig
from pipeline.store import tracking

pytestmark = pytest.mark.faults

LOCAL = TrackingConfig(None, "spectral-kv")
GRID = ["method=random,streaming,knorm,keydiff", "budget=60,70,80,90,100,110"]
KILLS = 10
MEASURING = "SELECT count(*) FROM runs WHERE run_uuid NOT IN (SELECT run_uuid FROM tags WHERE key = 'runs')"
PATIENCE = 300  # seconds that anything may take


def start(outputs: Path, small: list[str], *overrides: str) -> subprocess.Popen:
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens="))]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *settings, f"outputs={outputs}", "prefill_cache_least_s=0", *overrides],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # tests that a shell started in the background ignore SIGINT, and hand that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def begun(outputs: Path) -> int:
    """Runs in the store, in whatever state."""
    try:
        with closing(sqlite3.connect(f"file:{outputs / 'mlflow.db'}?mode=ro", uri=True)) as store:
            return store.execute(MEASURING).fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


def wait_for_a_run(outputs: Path, process: subprocess.Popen, more_than: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while begun(outputs) <= more_than and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(outputs: Path) -> list:
    """All runs but those above a sweep, which measure nothing."""
    client = tracking.connect(LOCAL, outputs).MlflowClient()
    found = client.search_runs([tracking.experiment_id()], max_results=1000)
    return [run for run in found if tracking.PARENT not in run.data.tags]


def table(outputs: Path) -> dict[tuple, dict[str, float]]:
    """Every metric that does not tell the time or where a prefill came from, by method and budget."""
    found = {}
    for run in runs(outputs):
        if run.info.status == "FINISHED":
            key = (run.data.params["method.name"], run.data.params["budget.resolved"])
            assert key not in found, f"{key} finished twice"
            found[key] = {k: v for k, v in run.data.metrics.items() if not k.startswith(("time/", "prefill/"))}
    return found


def test_a_sweep_killed_ten_times_ends_as_if_nothing_had_happened(small, tmp_path):
    seed = int.from_bytes(os.urandom(2))
    print(f"seed {seed}")  # pytest shows it when the test fails
    rng, outputs, killed = random.Random(seed), tmp_path / "killed", 0
    while killed < KILLS:
        process, before = start(outputs, small, *GRID, "-m"), begun(outputs)
        if killed % 4 == 3:
            time.sleep(rng.uniform(0, 5))  # while it starts, or makes its tables
        else:
            wait_for_a_run(outputs, process, before)
            time.sleep(rng.uniform(0, 0.7))
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break  # it was quicker than its killer
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    last = start(outputs, small, *GRID, "-m")
    assert last.wait(PATIENCE) == 0, last.stderr.read()
    assert killed >= KILLS // 2

    findings = examine(LOCAL, outputs)
    assert {finding.status for finding in findings if finding.run_id} <= {"KILLED"}  # nothing FINISHED is incomplete
    repair(findings)
    assert examine(LOCAL, outputs) == []
    states = [run.info.status for run in runs(outputs)]
    assert states.count("FINISHED") == 24 and set(states) <= {"FINISHED", "KILLED"}

    whole = start(tmp_path / "whole", small, *GRID, "-m")
    assert whole.wait(PATIENCE) == 0, whole.stderr.read()
    expected = table(tmp_path / "whole")
    assert len(expected) == 24 and table(outputs) == expected


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_run_killed_and_the_sweep(small, outputs_in, tmp_path, number, status, word):
    (tmp_path / "sweep").mkdir()
    outputs = outputs_in(tmp_path / "sweep")
    process = start(outputs, small, "document.count=12", "prefill_memory_gb=0", "prefill_cache_gb=0", *GRID, "-m")
    wait_for_a_run(outputs, process, 0)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors.strip()) == (status, f"pipeline: {word}; finished runs are kept")
    states = [run.info.status for run in runs(outputs)]
    assert states.count("KILLED") == 1 and set(states) <= {"KILLED", "FINISHED"}
    assert examine(LOCAL, outputs) == []


@pytest.fixture
def little_disk(tmp_path):
    """A folder on a file system of its own of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system needs root ({mounted.stderr.strip()})")
    yield folder
    tracking._connected = None
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("left", [0, 60_000, 300_000])
def test_a_full_disk_is_one_sentence_and_no_finished_run(small, outputs_in, little_disk, left):
    outputs = outputs_in(little_disk)
    filler = little_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"0" * max(shutil.disk_usage(outputs).free - left, 0))
    process = start(outputs, small, "method=random,snapkv,tova", "budget=60", "-m")
    _, errors = process.communicate(timeout=PATIENCE)
    lines = [line for line in errors.splitlines() if line.startswith("pipeline: ")]
    assert process.returncode in (1, 2) and len(lines) == 1, errors
    assert f"outputs={outputs}" in lines[0] and "Traceback" not in errors
    filler.unlink()
    assert all(run.info.status != "FINISHED" for run in runs(outputs))
    assert start(outputs, small, "method=random,snapkv,tova", "budget=60", "-m").wait(PATIENCE) == 0
    repair(examine(LOCAL, outputs))
    assert examine(LOCAL, outputs) == [] and len(table(outputs)) == 3
