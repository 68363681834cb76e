"""What interruptions and damage have left in a store: runs that nobody measures any more, half a record, bad files.

    python -m pipeline.doctor                 the store of the outputs folder
    python -m pipeline.doctor outputs=/data   another one; tracking.uri=... is understood as well
    python -m pipeline.doctor --look          report and change nothing

A run that is RUNNING although its process is gone from this machine is closed as KILLED. A FINISHED run that lacks its
metrics or its rows becomes FAILED, so that it is measured again. Damaged files of the prefill cache are removed. Runs
of other machines are only named: call the doctor there, or close them with `--all-hosts` if those machines are gone.

Exit status 0: nothing was wrong. 1: something was, and is put right unless `--look` is given. 2: the store can't be
opened.
"""

import argparse
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed, spelled_out
from pipeline.settings.config import TrackingConfig, typed
from pipeline.settings.errors import InputError
from pipeline.stages.prefill_cache import PrefillCache
from pipeline.store import tracking
from pipeline.store.record import ROWS

SAME = 2.0  # seconds by which the recorded start of a process may differ from the clock's


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run or a file; `status` is what the run should have."""

    what: str
    run_id: str | None = None
    status: str | None = None
    path: Path | None = None


def alive(tags: dict[str, str]) -> bool:
    """Whether the process that a run on this machine names is still there."""
    try:
        started = psutil.Process(int(tags["process.pid"])).create_time()
        return abs(started - float(tags["process.started"])) < SAME
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return False


def unfinished(runs: list, all_hosts: bool) -> Iterator[Finding]:
    """RUNNING runs without a process."""
    for run in runs:
        tags = run.data.tags
        host = tags.get("process.host")
        name = f"run {run.info.run_id} ({run.info.run_name})"
        if run.info.status != "RUNNING":
            continue
        if host not in (None, socket.gethostname()) and not all_hosts:
            yield Finding(f"{name} is RUNNING on {host}: call the doctor there, or --all-hosts if it is gone")
        elif host != socket.gethostname() or not alive(tags):
            where = f"process {tags.get('process.pid', 'of unknown id')} on {host or 'an unknown machine'}"
            yield Finding(f"{name} is RUNNING but its {where} is gone", run.info.run_id, "KILLED")


def incomplete(client, runs: list) -> Iterator[Finding]:
    """FINISHED runs that lack what every finished run has; one above a sweep has nothing of its own."""
    for run in runs:
        if run.info.status != "FINISHED" or tracking.PARENT in run.data.tags:
            continue
        missing = [] if "time/total_s" in run.data.metrics else ["metrics"]
        try:
            if ROWS not in {file.path for file in client.list_artifacts(run.info.run_id)}:
                missing.append(ROWS)
        except Exception as error:  # whatever the artifact store of a server raises
            missing.append(f"{ROWS} ({type(error).__name__})")
        if missing:
            name = f"run {run.info.run_id} ({run.info.run_name})"
            yield Finding(f"{name} is FINISHED but lacks {', '.join(missing)}", run.info.run_id, "FAILED")


def damaged(file: Path | None, outputs: Path) -> Iterator[Finding]:
    """A sqlite file that contradicts itself, and bad files of the prefill cache."""
    if file is not None:
        import sqlite3

        with closing(sqlite3.connect(file)) as store:
            (verdict,) = store.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            yield Finding(f"{file} is damaged ({verdict}): bring back a copy, or set outputs=<another folder>")
    for path, what in PrefillCache(outputs / "cache" / "prefill", 0).damage():
        yield Finding(what, path=path)


def examine(settings: TrackingConfig, outputs: Path, all_hosts: bool = False) -> list[Finding]:
    """Everything that is wrong with a store and the cache beside it.

    Raises
    ------
    InputError
        If there is no store, or it can't be opened.
    """
    file = tracking.database(settings, outputs)
    if file is not None and not file.is_file():
        raise InputError(f"there is no store at {file}: set outputs=<the folder of your runs>")
    mlflow = tracking.connect(settings, outputs)
    client = mlflow.MlflowClient()
    runs = tracking.runs(mlflow)
    return [*unfinished(runs, all_hosts), *incomplete(client, runs), *damaged(file, outputs)]


def repair(findings: list[Finding]) -> None:
    """Close runs and remove files; what a person must decide is left."""
    import mlflow

    client = mlflow.MlflowClient()
    for finding in findings:
        if finding.status is not None:
            client.set_tag(finding.run_id, "failure", finding.what)
            client.set_terminated(finding.run_id, finding.status)
        if finding.path is not None:
            finding.path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline: outputs, tracking")
    parser.add_argument("--look", action="store_true", help="report and change nothing")
    parser.add_argument("--all-hosts", action="store_true", help="also close runs that other machines left RUNNING")
    arguments = parser.parse_intermixed_args()
    with reporting(sys.argv[1:]):
        cfg = composed(spelled_out(arguments.overrides))
        outputs = Path(OmegaConf.select(cfg, "outputs")).resolve()
        settings = typed(TrackingConfig, cfg.tracking, "tracking")
        findings = examine(settings, outputs, arguments.all_hosts)
        if not arguments.look:
            repair(findings)
        for finding in findings:
            done = f": set to {finding.status}" if finding.status else ": removed" if finding.path else ""
            print(finding.what + ("" if arguments.look else done))
        print(f"{len(findings)} findings in {tracking.store_uri(settings, outputs)}")
        sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
