"""What the store holds for the document, which another process may read while jobs are made ready."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from pipeline.paper.follow import follow
from pipeline.settings.config import TrackingConfig
from pipeline.store import tracking


@dataclass(frozen=True)
class Stored:
    """A finished run of MLflow, as it stands there.

    Parameters
    ----------
    artifacts : str
        Address of its files.
    started : int
        When, in milliseconds since 1970.
    """

    run_id: str
    metrics: dict[str, float]
    tags: dict[str, str]
    artifacts: str
    started: int

    def rows(self) -> str:
        """The tidy rows as JSON."""
        address = urlparse(self.artifacts)
        if address.scheme == "file":
            return Path(url2pathname(address.path), "rows.json").read_text(encoding="utf-8")
        import mlflow

        return mlflow.artifacts.load_text(f"{self.artifacts}/rows.json")


def finished(settings: TrackingConfig, outputs: Path) -> dict[str, Stored]:
    """The newest finished run of every identity in a store; deleted runs are not among them."""
    mlflow = tracking.connect(settings, outputs)
    found = mlflow.search_runs(
        experiment_names=[settings.experiment],
        filter_string="attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
        max_results=50_000,
        output_format="list",
    )
    return {
        run.data.tags[tracking.CONFIGURATION]: Stored(
            run.info.run_id, dict(run.data.metrics), dict(run.data.tags), run.info.artifact_uri, run.info.start_time
        )
        for run in found
        if tracking.CONFIGURATION in run.data.tags
    }


def _apart() -> None:
    """End with the process that waits for this one, and not by Ctrl-C, which reaches all processes of a terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow()


@contextmanager
def ahead(
    settings: TrackingConfig, outputs: Path, processes: int
) -> Iterator[tuple[Callable[[], dict[str, Stored]], Executor | None]]:
    """What gives the finished runs of a store, which a process of its own begins to read at once, and that process.

    Importing MLflow and opening a store takes seconds. With one process, or where there is no store to read yet, it is
    read when it is asked for. The process takes other work until then, and ends.
    """
    file = tracking.database(settings, outputs)
    if processes < 2 or (file is not None and not file.is_file()):
        yield partial(finished, settings, outputs), None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, _apart)
    reading = pool.submit(finished, settings, outputs)

    def read() -> dict[str, Stored]:
        found = reading.result()
        pool.shutdown()  # measuring may take hours
        return found

    try:
        yield read, pool
    finally:
        pool.shutdown(cancel_futures=True)
