"""MLflow: one run a configuration, in a store that several processes may open at once."""

import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from pipeline.checkpoint import reachable
from pipeline.config import TrackingConfig
from pipeline.errors import InputError

PACKAGES = ("torch", "transformers", "numpy", "PyWavelets", "hydra-core", "mlflow")
CONFIGURATION = "identity"  # tag that holds the hash of everything that determines a result


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


def connect(tracking: TrackingConfig, outputs: Path):
    """The mlflow module, pointed at the store; a local store is created once, under a lock, in WAL mode."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if tracking.uri is not None:
        if tracking.uri.startswith(("http://", "https://")) and not reachable(tracking.uri):
            raise InputError(
                f"tracking.uri={tracking.uri} can't be reached: start the server, or set tracking.uri=null"
            )
        try:
            mlflow.set_tracking_uri(tracking.uri)
            mlflow.set_experiment(tracking.experiment)
        except mlflow.exceptions.MlflowException as error:
            reason = str(error).split("\n")[0]
            raise InputError(
                f"tracking.uri={tracking.uri} can't be used ({reason}): write an MLflow URI or null"
            ) from None
        return mlflow
    mlflow.set_tracking_uri(store_uri(tracking, outputs))
    import sqlite3

    with FileLock(outputs / "mlflow.lock"):
        with sqlite3.connect(outputs / "mlflow.db") as store:
            store.execute("PRAGMA journal_mode=WAL")
        store.close()
        if mlflow.get_experiment_by_name(tracking.experiment) is None:
            mlflow.create_experiment(tracking.experiment, artifact_location=(outputs / "artifacts").as_uri())
        mlflow.set_experiment(tracking.experiment)
    return mlflow


def find_finished(mlflow, experiment: str, identity: str):
    """The newest FINISHED run of a configuration, or None."""
    found = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.{CONFIGURATION} = '{identity}' and attributes.status = 'FINISHED'",
        max_results=1,
        output_format="list",
    )
    return found[0] if found else None


def environment() -> dict[str, str]:
    """Versions and code revision, for the tags of a run."""
    tags = {f"version.{name}": version(name) for name in PACKAGES}
    tags |= {
        "version.python": platform.python_version(),
        "platform": platform.platform(),
        "command": " ".join(sys.argv[1:])[:4000],
    }
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        tags["git.revision"] = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
        tags["git.changed"] = str(bool(changed)).lower()
    except (OSError, subprocess.CalledProcessError):
        tags["git.revision"] = "unknown (not a git checkout)"
    return tags


def _interrupt(signum, frame):
    raise KeyboardInterrupt


@contextmanager
def tracked(mlflow, name: str, params: dict, tags: dict) -> Iterator[str]:
    """An MLflow run that ends FINISHED only if its body does.

    FAILED with the traceback after an exception, KILLED after Ctrl-C or SIGTERM.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    status = "FAILED"
    try:
        run = mlflow.start_run(run_name=name, tags=tags)
        mlflow.log_params(params)
        yield run.info.run_id
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Exception:
        mlflow.log_text(traceback.format_exc(), "traceback.txt")
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may come between here and the status
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        mlflow.end_run(status)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, previous)
