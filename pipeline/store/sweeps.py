"""The run above the runs of a sweep: it holds them together in the UI, with their results and curves over budgets."""

import os
import sys
import time
from collections import defaultdict
from pathlib import Path

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from pipeline.settings.config import TrackingConfig, typed
from pipeline.store import tracking
from pipeline.store.record import BATCH, LONGEST

NESTED = "mlflow.parentRunId"
SHOWN = ("memory/ratio", "aop/mean", "ppl/nd", "ppl/kl", "retrieval/recall", "throughput/speedup")  # in the description
CURVES = ("aop/mean", "ppl/nd", "ppl/kl", "retrieval/recall")
BUDGET = "budget.resolved"
LAUNCHER = "SPECTRAL_KV_LAUNCHER"  # what jobs find in their environment: host, id and start of the process above them
PROCESS = ("process.host", "process.pid", "process.started")

_parents: dict[tuple[str, str], str] = {}  # by store and sweep


def launched() -> str:
    """An override that tells every job of a sweep which process launches it: this one."""
    own = tracking.process(os.getpid())
    return f"++hydra.job.env_set.{LAUNCHER}='{' '.join(own[tag] for tag in PROCESS)}'"


def _launcher() -> dict[str, str]:
    """Tags of the process that launched this job: when that is gone the sweep is over, and not with any of its jobs."""
    told = os.environ.get(LAUNCHER)
    return dict(zip(PROCESS, told.split(" "), strict=True)) if told else tracking.process(os.getpid())


def _name(config: DictConfig) -> str:
    return config.tracking.sweep or "/".join(Path(config.hydra.sweep.dir).parts[-2:])


def _existing(mlflow, sweep: str) -> str | None:
    """The run above a sweep, whose name may have quotes in it, which a filter can't."""
    found = tracking.runs(mlflow, f"tags.{tracking.PARENT} = 'sweep'")
    return next((run.info.run_id for run in found if run.data.tags.get("sweep") == sweep), None)


def parent(mlflow, settings: TrackingConfig, outputs: Path) -> str | None:
    """The run above a job of a sweep, made by whichever job needs it first; None outside of sweeps."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    about = tracking.membership(settings)
    sweep = about["sweep"]
    key = (tracking.store_uri(settings, outputs), sweep)
    if key not in _parents:
        with FileLock(outputs / "locks" / "sweep.lock"):
            _parents[key] = _existing(mlflow, sweep) or _made(mlflow, about)
    return _parents[key]


def _made(mlflow, about: dict[str, str]) -> str:
    own = {tag: value for tag, value in tracking.environment().items() if not tag.startswith("process.")}
    tags = own | _launcher() | about | {tracking.PARENT: "sweep"}
    name = " ".join(["sweep", *([about["table"]] if "table" in about else []), about["sweep"]])
    return mlflow.MlflowClient().create_run(tracking.experiment_id(), run_name=name, tags=tags).info.run_id


def close(config: DictConfig, status: str) -> None:
    """End the run above a sweep, if one was made: description, curves, status."""
    outputs = Path(OmegaConf.select(config, "outputs")).resolve()
    settings = typed(TrackingConfig, config.tracking, "tracking")
    file = tracking.database(settings, outputs)
    if file is not None and not file.is_file():
        return
    mlflow = tracking.connect(settings, outputs)
    run_id = _existing(mlflow, _name(config))
    if run_id is None:
        return
    client = mlflow.MlflowClient()
    children = tracking.runs(mlflow, f"tags.`{NESTED}` = '{run_id}' and attributes.status = 'FINISHED'")
    note = f"`python -m pipeline {' '.join(sys.argv[1:])}`\n\n{described(children)}"
    client.set_tag(run_id, "mlflow.note.content", note[:LONGEST])
    _draw(client, run_id, children)
    if "failure" in client.get_run(run_id).data.tags:  # the doctor of another machine was told to close it
        client.delete_tag(run_id, "failure")
    client.set_terminated(run_id, status)


def described(children: list) -> str:
    """A line of Markdown for every run: what it is, and its main metrics."""
    shown = [name for name in SHOWN if any(name in run.data.metrics for run in children)]
    about = {"tokens": (BUDGET, "-"), "storage": ("storage.name", "-"), "model": ("model.name", "-")}
    further = {"allocation": ("budget.allocation", "uniform"), "refit": ("refit.name", "none")}
    about |= {name: key for name, key in further.items() if len({run.data.params.get(*key) for run in children}) > 1}
    head = ["method", *about, *shown]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for run in sorted(children, key=lambda run: run.info.start_time):
        params, metrics = run.data.params, run.data.metrics
        cells = [run.data.tags.get("title", "-"), *(params.get(*key) for key in about.values())]
        cells += [f"{metrics[name]:.4g}" if name in metrics else "-" for name in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if children else "Nothing was measured."


def curves(children: list) -> dict[str, dict[int, float]]:
    """Metrics over budgets by method, where a sweep has several budgets and they alone tell a method's runs apart.

    Returns
    -------
    dict of str to dict of int to float
        By name, such as `ppl/kl over budgets/WaveletKV`, the value at every budget in tokens.
    """
    by_method = defaultdict(list)
    for run in children:
        if run.data.params.get(BUDGET, "").isdigit():
            by_method[run.data.tags.get("title", "-")].append(run)
    found: dict[str, dict[int, float]] = {}
    for title, runs in by_method.items():
        budgets = [int(run.data.params[BUDGET]) for run in runs]
        if len(runs) < 2 or len(set(budgets)) < len(runs):
            continue
        for metric in CURVES:
            own = zip(budgets, (run.data.metrics for run in runs), strict=True)
            points = {budget: metrics[metric] for budget, metrics in own if metric in metrics}
            if points:
                found[f"{metric} over budgets/{title}"] = dict(sorted(points.items()))
    return found


def _draw(client, run_id: str, children: list) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(name, v, now, step) for name, own in curves(children).items() for step, v in own.items()]
    if points:
        client.log_batch(run_id, metrics=points[:BATCH])
