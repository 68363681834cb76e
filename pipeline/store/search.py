"""Finished runs of the store, chosen by their settings; nothing is measured."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from pipeline.settings.compose import composed, spelled_out
from pipeline.settings.config import TrackingConfig, typed
from pipeline.settings.errors import InputError
from pipeline.show.summary import LABELS, spread
from pipeline.statistics import Estimate
from pipeline.store import tracking

STORE = ("outputs", "tracking")  # settings that say where to look, not for what
ALWAYS = ("method", "tokens", "storage")  # columns that are there even if all runs agree
TAGS = ("table", "sweep")
SHOWN = ("memory/ratio", "aop/mean", "mass/mean", "ppl/nd", "ppl/kl", "ppl/top1", "drift/aop_slope", "retrieval/recall")


def _fits(key: str, value: str | None, wanted: list[str]) -> bool:
    """Whether a logged value is one of those wanted; 0.1 and 1e-1 are the same, and a run may be in several tables."""
    if value in wanted or (key == "table" and set(wanted) & set((value or "").split(","))):
        return True
    try:
        return float(value) in {float(x) for x in wanted}
    except (TypeError, ValueError):
        return False


def _logged(run, key: str) -> str | None:
    """What a run logged for a setting; a group stands for its option, `budget.tokens` for what was really kept."""
    if key in TAGS:
        return run.data.tags.get(key)
    if key == "budget.tokens":
        return run.data.params.get("budget.resolved")
    return run.data.params.get(key, run.data.params.get(f"{key}.name"))


def opened(overrides: list[str]) -> tuple[ModuleType, TrackingConfig, Path]:
    """MLflow pointed at the store that settings name, which must be there; the settings, and the outputs folder.

    Raises
    ------
    InputError
        If there is no store.
    """
    cfg = composed(overrides)
    settings = typed(TrackingConfig, cfg.tracking, "tracking")
    outputs = Path(OmegaConf.select(cfg, "outputs")).resolve()
    return existing(settings, outputs), settings, outputs


def existing(settings: TrackingConfig, outputs: Path) -> ModuleType:
    """MLflow pointed at a store, which must be there.

    Raises
    ------
    InputError
        If there is none.
    """
    file = tracking.database(settings, outputs)
    if file is not None and not file.is_file():
        raise InputError(f"there is no store at {file}: set outputs=<the folder of your runs>")
    return tracking.connect(settings, outputs)


def finished(mlflow: ModuleType) -> list:
    """All finished runs of a store, the newest first, without those that only hold others together."""
    runs = tracking.runs(mlflow, "attributes.status = 'FINISHED'")
    return [run for run in runs if tracking.PARENT not in run.data.tags]


def stores(overrides: list[str]) -> list[str]:
    """Those of some settings that say which store to look in."""
    return [override for override in overrides if override.partition("=")[0].partition(".")[0] in STORE]


def chosen(overrides: list[str]) -> list:
    """The newest finished run of every configuration that fits all of `setting=value,value`.

    Raises
    ------
    InputError
        If there is no store or a setting is one that no run has logged.
    """
    pairs = [override.split("=", 1) for override in spelled_out(overrides)]
    if bad := [pair[0] for pair in pairs if len(pair) < 2]:
        raise InputError(f"{bad[0]} can't be read: write setting=value or setting=value,value")
    mlflow, _, _ = opened(stores(overrides))
    newest = {run.data.tags.get(tracking.CONFIGURATION, run.info.run_id): run for run in reversed(finished(mlflow))}
    found = sorted(newest.values(), key=lambda run: run.info.start_time)
    for key, value in pairs:
        if key.partition(".")[0] in STORE:
            continue
        if found and all(_logged(run, key) is None for run in found):
            raise InputError(f"no run has logged {key}: choose among the settings of --cfg job, or table, sweep")
        found = [run for run in found if _fits(key, _logged(run, key), value.split(","))]
    return found


def _described(run) -> dict[str, str]:
    """What tells a run from another."""
    params = run.data.params
    return {
        "method": run.data.tags.get("title", "-"),
        "tokens": params.get("budget.resolved", "-"),
        "storage": params.get("storage.name", "-"),
        "allocation": params.get("budget.allocation", "uniform"),
        "refit": params.get("refit.name", "none"),
        "backend": params.get("backend.name", "-"),
        "model": params.get("model.name", "-"),
        "documents": f"{params.get('document.count')} x {params.get('document.tokens')} {params.get('document.name')}",
        "seed": params.get("seed", "-"),
    }


def show(overrides: list[str], metrics: list[str]) -> None:
    """Print one row a run and one column a metric, with 95 % intervals."""
    runs = chosen(overrides)
    if not runs:
        raise InputError("no finished run fits: give fewer settings, or measure with python -m pipeline")
    shown = [m for m in metrics or SHOWN if any(m in run.data.metrics for run in runs)]
    if missing := [m for m in metrics if m not in shown]:
        known = sorted({m for run in runs for m in run.data.metrics if not m.endswith(("_low", "_high"))})
        raise InputError(f"no chosen run has the metric {missing[0]}: choose among {', '.join(known)}")
    described = [_described(run) for run in runs]
    columns = [name for name in described[0] if name in ALWAYS or len({d[name] for d in described}) > 1]
    same = [f"{name} {value}" for name, value in described[0].items() if name not in columns]
    title = "; ".join(["mean over documents [95 % interval]", *same])
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (*columns, *shown, "run"):
        table.add_column(name, justify="right" if name in (*shown, "tokens") else "left")
    for run, description in zip(runs, described, strict=True):
        found = run.data.metrics
        cells = []
        for m in shown:
            bounds = (found.get(f"{m}_{bound}", np.nan) for bound in ("low", "high"))
            cells.append(spread(Estimate(found[m], *bounds), LABELS.get(m, ("", "{:.3f}"))[1]) if m in found else "-")
        table.add_row(*(description[name] for name in columns), *cells, run.info.run_id[:8])
    Console(highlight=False, width=220 if not sys.stdout.isatty() else None).print(table)
