"""The MLflow record of one run, from its start to a status that can be trusted."""

import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from pipeline.settings.errors import terminate
from pipeline.store.shared import insert
from pipeline.store.tracking import experiment_id

ROWS = "rows.json"  # artifact that holds the tidy rows of a run
LONGEST = 5000  # characters of a parameter or tag
BATCH = 1000  # metrics that a store takes at once
PARAMS = 100  # and parameters

_marks: ContextVar[dict[str, str] | None] = ContextVar("marks", default=None)


@contextmanager
def marked(tags: dict[str, str]) -> Iterator[None]:
    """Give tags to every run that is begun while it lasts, however that ends; they go before the run's own."""
    token = _marks.set((_marks.get() or {}) | tags)
    try:
        yield
    finally:
        _marks.reset(token)


@contextmanager
def _observed(run_id: str) -> Iterator[None]:
    """Have MLflow record the load of the machine, if its own setting `MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING` asks."""
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """While it lasts SIGTERM is raised as `Terminated`; what it yields puts SIGTERM and Ctrl-C off until it is over."""
    if threading.current_thread() is not threading.main_thread():  # no other thread gets signals
        yield lambda: None
        return
    late: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, terminate)

    def postpone() -> None:
        for number in previous:
            signal.signal(number, lambda signum, frame: late.append(signum))

    try:
        yield postpone
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in late[:1]:
        signal.raise_signal(number)


class Record:
    """An open run.

    Parameters
    ----------
    client : mlflow.MlflowClient
    run_id : str
    """

    def __init__(self, client, run_id: str):
        self.client, self.run_id = client, run_id

    def reads(self, name: str, digest: str, about: dict[str, object]) -> None:
        """Name the documents that are measured, as a dataset: the UI lists runs by it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        text = json.dumps(about)
        dataset = Dataset(name[:500], digest, "code", text, profile=text)
        read = DatasetInput(dataset, [InputTag("mlflow.data.context", "measured")])
        insert(self.client.log_inputs, self.run_id, [read])

    def log(
        self, files: Path, metrics: dict[str, float], curves: dict[int, dict[str, float]], note: str | None = None
    ) -> None:
        """Log the files of a folder, then metrics, metrics by step, and a description."""
        from mlflow.entities import Metric, RunTag

        for path in sorted(files.rglob("*")):
            if path.is_file():
                folder = path.parent.relative_to(files).as_posix()
                self.client.log_artifact(self.run_id, str(path), None if folder == "." else folder)
        now = int(time.time() * 1000)
        points = [Metric(name, value, now, 0) for name, value in metrics.items()]
        points += [Metric(name, v, now, step) for step, values in curves.items() for name, v in values.items()]
        table = json.dumps([{"path": ROWS, "type": "table"}])  # by this tag the UI and mlflow.load_table know it
        tags = [RunTag("mlflow.loggedArtifacts", table)] if (files / ROWS).is_file() else []
        tags += [RunTag("mlflow.note.content", note[:LONGEST])] if note else []
        self.client.log_batch(self.run_id, metrics=points[:BATCH], tags=tags)
        for start in range(BATCH, len(points), BATCH):
            self.client.log_batch(self.run_id, metrics=points[start : start + BATCH])


@contextmanager
def tracked(mlflow, name: str, params: dict, tags: dict) -> Iterator[Record]:
    """An MLflow run that ends FINISHED only if its body does.

    FAILED with the traceback after an exception, KILLED after Ctrl-C or SIGTERM. Where the store can't even take the
    status, on a full disk, the run stays RUNNING, which is never taken for done; `python -m pipeline.doctor` closes it.
    """
    from mlflow.entities import Param

    client = mlflow.MlflowClient()
    with _signals() as postpone:
        run_id, status = None, "FAILED"
        try:
            run_id = client.create_run(experiment_id(), run_name=name, tags=tags | (_marks.get() or {})).info.run_id
            logged = [Param(key, str(value)[:LONGEST]) for key, value in params.items()]
            for start in range(0, len(logged), PARAMS):
                client.log_batch(run_id, params=logged[start : start + PARAMS])
            with _observed(run_id):
                yield Record(client, run_id)
            postpone()
            client.set_terminated(run_id, "FINISHED")
            status = None
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            if run_id is not None:
                error.add_note(f"MLflow run {run_id} holds this traceback")
                with suppress(Exception):  # the error itself matters more
                    client.log_text(run_id, traceback.format_exc(), "traceback.txt")
                with suppress(Exception):
                    client.set_tag(run_id, "failure", f"{type(error).__name__}: {error}"[:LONGEST])
            raise
        finally:
            postpone()
            if run_id is not None and status is not None:
                with suppress(Exception):
                    client.set_terminated(run_id, status)
