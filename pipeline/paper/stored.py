"""What the store holds for the document."""

import math
import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from filelock import FileLock

from pipeline.settings.config import TrackingConfig
from pipeline.store import tracking

FINISHED = """
    SELECT run_uuid, artifact_uri, start_time FROM runs JOIN experiments USING (experiment_id)
    WHERE status = 'FINISHED' AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'
    AND experiments.name = ? ORDER BY start_time
"""


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


def _from_file(settings: TrackingConfig, outputs: Path) -> list[Stored]:
    """Finished runs of a store that is a sqlite file, the oldest first, read from MLflow's own tables.

    Importing MLflow takes seconds, which a document whose runs are all there need not wait for. Nothing is found where
    there is no such file or its tables are others: MLflow brings old ones up to date, and has words for the rest.
    """
    file = tracking.database(settings, outputs)
    if file is None or not file.is_file():
        return []
    tags, metrics = defaultdict(dict), defaultdict(dict)
    try:
        if file.parent == outputs:
            with FileLock(outputs / "mlflow.lock"):
                tracking.artifacts_follow(file, (outputs / "artifacts").as_uri())
        with closing(sqlite3.connect(file)) as store:
            runs = store.execute(FINISHED, (settings.experiment,)).fetchall()
            of = f"JOIN ({FINISHED}) USING (run_uuid)"
            for run, key, value in store.execute(f"SELECT run_uuid, key, value FROM tags {of}", (settings.experiment,)):
                tags[run][key] = value
            latest = f"SELECT run_uuid, key, value, is_nan FROM latest_metrics {of}"
            for run, key, value, is_nan in store.execute(latest, (settings.experiment,)):
                metrics[run][key] = math.nan if is_nan else value
    except (sqlite3.Error, OSError):
        return []
    return [Stored(run, metrics[run], tags[run], artifacts, started) for run, artifacts, started in runs]


def _from_mlflow(settings: TrackingConfig, outputs: Path) -> list[Stored]:
    """The same as MLflow gives it, wherever the store is."""
    mlflow = tracking.connect(settings, outputs)
    found = mlflow.search_runs(
        experiment_names=[settings.experiment],
        filter_string="attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
        max_results=50_000,
        output_format="list",
    )
    return [
        Stored(
            run.info.run_id, dict(run.data.metrics), dict(run.data.tags), run.info.artifact_uri, run.info.start_time
        )
        for run in found
    ]  # fmt: skip


def finished(settings: TrackingConfig, outputs: Path) -> dict[str, Stored]:
    """The newest finished run of every identity in a store; deleted runs are not among them.

    Raises
    ------
    InputError
        If the store can't be used.
    """
    found = _from_file(settings, outputs) or _from_mlflow(settings, outputs)
    return {run.tags[tracking.CONFIGURATION]: run for run in found if tracking.CONFIGURATION in run.tags}
