"""Which GPU a process of a sweep has; no GPU is needed to ask."""

import os
import subprocess
import sys

import pytest

from pipeline.settings import gpus
from pipeline.settings.errors import InputError

TAKE = """
import os, sys
from pathlib import Path
from pipeline.settings import gpus
gpus.take(Path(sys.argv[1]))
gpus.take(Path(sys.argv[1]))  # it keeps the one that it has
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def test_names_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,MIG-7")
    assert gpus.visible() == ["3", "5", "MIG-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="local_gpus finds no GPU: choose hydra/launcher=local_joblib"):
        gpus.offer()


def test_every_process_has_another_one_until_it_ends(tmp_path, monkeypatch):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "3,5"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    taken = [process.stdout.readline().strip() for process in processes]
    assert sorted(taken) == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(gpus, "_taken", None)
    with pytest.raises(InputError, match="other processes have all of the GPUs 3, 5"):
        gpus.take(tmp_path)
    for process in processes:
        process.communicate()
    gpus.take(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    gpus._taken.release()
