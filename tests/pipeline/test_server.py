"""Runs in an MLflow server on PostgreSQL, both started here on addresses of this machine alone."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.store.tracking import PARENT

pytestmark = pytest.mark.faults

PATIENCE = 120  # seconds until a server must answer


def programs() -> Path | None:
    """The folder of PostgreSQL's programs; Debian keeps them off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "/")]
    return found[-1].parent if found[-1].is_file() else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def database():
    """URI of an empty database."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("PostgreSQL's driver is not installed: pip install 'spectral-kv[server]'")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if user:
        shutil.chown(folder, "postgres")
    port, data = free_port(), folder / "data"
    created = [*user, programs() / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-N"]
    subprocess.run(created, check=True, capture_output=True, cwd="/")
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", folder, "-p", str(port)]
    server = subprocess.Popen(
        [*user, programs() / "postgres", "-D", data, *settings], cwd="/", stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ready = [programs() / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    deadline = time.monotonic() + PATIENCE
    try:
        while subprocess.run(ready, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.2)
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
    finally:  # also if it never became ready
        stop = [*user, programs() / "pg_ctl", "stop", "-D", data, "-m", "immediate"]
        subprocess.run(stop, capture_output=True, cwd="/")
        server.wait(PATIENCE)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    """URI of an MLflow server on that database."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--artifacts-destination",
        str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not answers(f"{uri}/health"):
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, 15)
        process.wait(PATIENCE)


def test_several_processes_share_a_server(small, server, tmp_path):
    settings = [o for o in small if not o.startswith(("outputs=", "budget.tokens="))]
    outputs = [tmp_path / "first", tmp_path / "second"]

    def start(place: Path, budgets: str) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "pipeline", *settings, f"outputs={place}", f"tracking.uri={server}",
            "method=random,tova", f"budget={budgets}", "tracking.figures=true", "-m",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    processes = [start(place, budget) for place, budget in zip(outputs, ("60", "70"), strict=True)]
    for process in processes:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "Measured before" not in said
    said, errors = start(tmp_path / "third", "60,70").communicate(timeout=300)
    assert said.count("Measured before with the same code, model and documents") == 4, errors

    import mlflow

    client = mlflow.MlflowClient(server)
    found = client.search_runs([client.get_experiment_by_name("spectral-kv").experiment_id])
    runs = [run for run in found if PARENT not in run.data.tags]
    assert len(runs) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.artifact_uri.split(":")[0] for run in runs} == {"mlflow-artifacts"}
    for run in runs:
        assert {"config.yaml", "rows.json", "figures"} == {file.path for file in client.list_artifacts(run.info.run_id)}
    assert not (tmp_path / "first" / "mlflow.db").exists()
    looked = subprocess.run(
        [sys.executable, "-m", "pipeline.doctor", f"tracking.uri={server}", f"outputs={tmp_path / 'first'}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert looked.returncode == 0 and f"0 findings in {server}" in looked.stdout, looked.stderr


def test_a_database_itself_can_be_the_store(small, database, tmp_path):
    settings = [o for o in small if not o.startswith("outputs=")]
    command = [
        sys.executable, "-m", "pipeline", *settings, f"outputs={tmp_path / 'o'}", f"tracking.uri={database}",
        "tracking.experiment=direct", "method=random",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "o" / "artifacts").glob("*/artifacts/rows.json"))
