"""MLflow: one run a configuration, in a store that several processes may open at once."""

import getpass
import logging
import os
import platform
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import urlopen

import psutil
from filelock import FileLock

from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError
from pipeline.store import view

PACKAGES = ("torch", "transformers", "numpy", "PyWavelets", "hydra-core", "mlflow")
PATIENCE = 5  # seconds until a server that says nothing counts as not there
PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
CONFIGURATION = "identity"  # tag that holds the hash of everything that determines a result
PARENT = "runs"  # tag of a run that measures nothing and holds those of a sweep together

_connected: tuple | None = None  # the store that mlflow points to: opening one takes most of a second
_experiment_id: str = ""


def writable(outputs: Path) -> None:
    """Make the outputs folder and prove that it can be written to.

    Raises
    ------
    InputError
        If it can't.
    """
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=outputs):
            pass
    except OSError as error:
        raise InputError(
            f"outputs={outputs} can't be written to ({error.strerror}): set outputs=<a folder of yours>"
        ) from None


def store_uri(tracking: TrackingConfig, outputs: Path) -> str:
    """Where runs go: the configured server, or the sqlite file of the outputs folder."""
    return tracking.uri or f"sqlite:///{outputs / 'mlflow.db'}"


def database(tracking: TrackingConfig, outputs: Path) -> Path | None:
    """The sqlite file of the store, if it is one."""
    uri = store_uri(tracking, outputs)
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _answers(uri: str) -> bool:
    """Whether somebody speaks at the address of a store: MLflow itself would wait for minutes.

    PostgreSQL and MySQL are asked in the first words of their protocols.
    """
    url = urlparse(uri)
    try:
        if url.scheme in ("http", "https"):
            with suppress(HTTPError), urlopen(f"{uri.rstrip('/')}/health", timeout=PATIENCE):
                pass
            return True
        port = url.port or PORTS.get(url.scheme.partition("+")[0])
        if port is None or not url.hostname:  # a file, or a socket of this machine
            return True
        with socket.create_connection((url.hostname, port), timeout=PATIENCE) as line:
            if url.scheme.startswith("postgresql"):
                line.sendall(struct.pack("!ii", 8, 80877103))  # a request for encryption, answered by one letter
            return url.scheme.startswith("mssql") or bool(line.recv(1))
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # MLflow has settings of its own for certificates
    except (OSError, HTTPException):
        return False


def refuse_unusable(tracking: TrackingConfig, outputs: Path) -> None:
    """Refuse a server that does not answer, and a file that is no database, before anything heavy is imported.

    Raises
    ------
    InputError
    OSError
        If locks can't be made in the outputs folder.
    """
    import sqlite3

    uri, file = store_uri(tracking, outputs), database(tracking, outputs)
    if not _answers(uri):
        raise InputError(f"tracking.uri={uri} can't be reached: start the server, or set tracking.uri=null")
    (outputs / "locks").mkdir(parents=True, exist_ok=True)
    if file is not None and file.is_file():
        try:
            with closing(sqlite3.connect(file)) as store:
                store.execute("PRAGMA schema_version")
        except sqlite3.OperationalError:  # somebody else is busy with it
            pass
        except sqlite3.DatabaseError as error:
            raise _unusable(error, tracking, outputs) from error


def connect(tracking: TrackingConfig, outputs: Path):
    """The mlflow module, pointed at the store; a database is prepared once, under a lock, a sqlite file in WAL mode.

    Raises
    ------
    InputError
        If the store can't be used.
    """
    global _connected, _experiment_id
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    uri, file = store_uri(tracking, outputs), database(tracking, outputs)
    key = (os.getpid(), uri, tracking.experiment, outputs, file.stat().st_ino if file and file.is_file() else None)
    if key == _connected and mlflow.get_tracking_uri() == uri:
        return mlflow
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints what it then raises
    refuse_unusable(tracking, outputs)
    try:
        mlflow.set_tracking_uri(uri)
        if uri.startswith(("http://", "https://")):  # the server decides where artifacts go
            _experiment_id = _chosen(mlflow, tracking.experiment)
        else:
            with FileLock(outputs / "mlflow.lock"):
                _experiment_id = _prepared(mlflow, tracking.experiment, outputs, file)
    except InputError:
        raise
    except Exception as error:  # of MLflow, its database library, or the database's driver
        raise _unusable(error, tracking, outputs) from error
    _connected = (*key[:-1], file.stat().st_ino if file else None)
    return mlflow


def _prepared(mlflow, experiment: str, outputs: Path, file: Path | None) -> str:
    """The id of the experiment in a database that has all its tables."""
    if file is not None:
        import sqlite3

        with sqlite3.connect(file) as store:
            store.execute("PRAGMA journal_mode=WAL")
        store.close()
        if file.parent == outputs:
            artifacts_follow(file, (outputs / "artifacts").as_uri())
    found = mlflow.get_experiment_by_name(experiment)
    if found is not None and found.lifecycle_stage == "deleted":
        raise InputError(
            f"tracking.experiment={experiment} was deleted: bring it back with `MLFLOW_TRACKING_URI="
            f"{mlflow.get_tracking_uri()} mlflow experiments restore -x {found.experiment_id}`, or choose another name"
        )
    if found is None:
        mlflow.create_experiment(experiment, artifact_location=(outputs / "artifacts").as_uri())
    return _chosen(mlflow, experiment)


def _chosen(mlflow, name: str) -> str:
    """The id of an experiment that runs go to, with a view of its list that shows metrics."""
    experiment = mlflow.set_experiment(name)
    view.offer(mlflow, experiment)
    return experiment.experiment_id


def artifacts_follow(file: Path, artifacts: str) -> None:
    """Point the experiments and runs of a copied or moved outputs folder at the artifacts that came with it.

    MLflow records absolute locations only; a location of somebody's own choice, which no outputs folder has, stays.
    """
    import sqlite3

    with sqlite3.connect(file) as store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return
        told = store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (old,) in told:
            if old and old != artifacts and old.startswith("file://") and old.endswith("/artifacts"):
                store.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                    (artifacts, len(old) + 1, len(old) + 1, f"{old}/"),
                )
                store.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (artifacts, old)
                )
    store.close()


def _unusable(error: Exception, tracking: TrackingConfig, outputs: Path) -> InputError:
    reason = " ".join(str(error).split("\n")[0].split())
    if tracking.uri is not None:
        return InputError(f"tracking.uri={tracking.uri} can't be used ({reason}): write an MLflow URI or null")
    return InputError(
        f"{outputs / 'mlflow.db'} can't be used as an MLflow store ({reason}): "
        "bring back a copy of it, or set outputs=<another folder> to begin anew"
    )


def experiment_id() -> str:
    """The experiment of the store that `connect` opened last."""
    return _experiment_id


def runs(mlflow, filter_string: str = "") -> list:
    """All runs of the experiment that fit a filter, newest first."""
    return mlflow.search_runs(
        experiment_ids=[experiment_id()], filter_string=filter_string, max_results=10**6, output_format="list"
    )


def find_finished(mlflow, identity: str):
    """The newest FINISHED run of a configuration, or None; a run that is still open is never taken for done."""
    found = mlflow.MlflowClient().search_runs(
        [experiment_id()],
        filter_string=f"tags.{CONFIGURATION} = '{identity}' and attributes.status = 'FINISHED'",
        max_results=1,
    )
    return found[0] if found else None


@contextmanager
def claim(outputs: Path, identity: str) -> Iterator[None]:
    """One process of this machine at a time measures a configuration; the next one then finds it finished."""
    path = outputs / "locks" / f"{identity}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
        path.unlink(missing_ok=True)  # after a failure it stays: others may be waiting on it to try themselves


@cache
def revision(folder: Path) -> dict[str, str]:
    """The commit that a folder of sources is at, and whether files that git knows were changed since."""
    git = ["git", "-C", str(folder)]
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return {"git.revision": "unknown (not a git checkout)"}
    return {"git.revision": head, "git.changed": str(bool(changed)).lower(), "mlflow.source.git.commit": head}


@cache
def process(pid: int) -> dict[str, str]:
    """Tags by which the doctor knows whether a process of this machine is still there, and where it was placed."""
    tags = {"process.slurm": "SLURM_JOB_ID", "process.gpu": "CUDA_VISIBLE_DEVICES"}
    placed = {tag: os.environ[name] for tag, name in tags.items() if os.environ.get(name)}
    return {
        "process.host": socket.gethostname(),
        "process.pid": str(pid),
        "process.started": f"{psutil.Process(pid).create_time():.2f}",  # seconds since 1970: pids come round again
        **placed,
    }


def membership(tracking: TrackingConfig) -> dict[str, str]:
    """Tags that say to which table and which sweep a run belongs, by the settings or by Hydra."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    table, sweep = tracking.table, tracking.sweep
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        table = table or hydra.runtime.choices.get("experiment")
        if hydra.mode == RunMode.MULTIRUN:
            sweep = sweep or "/".join(Path(hydra.sweep.dir).parts[-2:])
    return {name: value for name, value in (("table", table), ("sweep", sweep)) if value}


def join(mlflow, run, tracking: TrackingConfig) -> None:
    """Add the table that asked for a finished run to those in its tag; the sweep that measured it stays."""
    tables = {name for name in run.data.tags.get("table", "").split(",") if name}
    table = membership(tracking).get("table")
    if table is not None and table not in tables:
        mlflow.MlflowClient().set_tag(run.info.run_id, "table", ",".join(sorted({*tables, table})))


def environment() -> dict[str, str]:
    """Versions, code revision and the process, for the tags of a run."""
    tags = {f"version.{name}": version(name) for name in PACKAGES}
    if (torch := sys.modules.get("torch")) is not None:  # sums on a CPU round by how many share them
        tags["threads"] = str(torch.get_num_threads())
    return {
        **tags,
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "command": " ".join(sys.argv[1:])[:4000],
        "mlflow.source.name": Path(sys.argv[0]).name,
        "mlflow.user": getpass.getuser(),
        **revision(Path(__file__).resolve().parent),
        **process(os.getpid()),
    }
