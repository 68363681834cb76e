"""A worker does not outlive the process that it works for, and closes its run first."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.paper import measured
from pipeline.paper.follow import PATIENCE, outliving
from pipeline.settings.errors import Exhausted

POOL = """
import multiprocessing, os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from pipeline.paper.follow import follow
from pipeline.store.record import _signals

def work(folder):
    with _signals():
        try:
            open(f"{folder}/pid", "w").write(str(os.getpid()))
            time.sleep(60)
        except KeyboardInterrupt:
            open(f"{folder}/closed", "w").close()
            raise

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, follow) as pool:
        pool.submit(work, sys.argv[1]).result()
"""


def wait_until(true, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_parent(tmp_path, number):
    (tmp_path / "pool.py").write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "pool.py"), str(tmp_path)], cwd=Path.cwd())
    pid = tmp_path / "pid"
    assert wait_until(lambda: pid.is_file() and pid.read_text())
    worker = int(pid.read_text())
    parent.send_signal(number)
    parent.wait()
    assert wait_until(lambda: not psutil.pid_exists(worker), PATIENCE + 20)
    assert (tmp_path / "closed").is_file()


@pytest.mark.faults
def test_what_composes_the_sections_ends_with_the_command(tmp_path):
    command = ["-m", "pipeline.paper", "--sections", "seeds,budgets", "--processes", "2", f"outputs={tmp_path}"]
    parent = subprocess.Popen([sys.executable, *command, "model=synthetic"], cwd=Path.cwd())

    def composing() -> list[psutil.Process]:
        return [p for p in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(p.cmdline())]

    assert wait_until(lambda: len(composing()) == 2)
    workers = composing()
    parent.kill()
    parent.wait()
    try:
        assert wait_until(lambda: not any(worker.is_running() for worker in workers))
    finally:
        for worker in (worker for worker in workers if worker.is_running()):
            worker.kill()


def test_those_that_share_the_work_follow(monkeypatch):
    followed = []
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(measured, "follow", lambda: followed.append(True))
    measured._one_of(2)
    assert followed == [True]


def test_a_process_that_was_killed_is_a_sentence():
    context = multiprocessing.get_context("fork")
    said = r"one of the 3 processes .* fewer --processes.* finished runs are kept"
    with pytest.raises(Exhausted, match=said), outliving(3), ProcessPoolExecutor(1, context) as pool:
        pool.submit(os._exit, 9).result()
    with pytest.raises(ZeroDivisionError), outliving(3):
        _ = 1 / 0
