"""Finished runs as pandas frames."""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from pipeline.settings.config import TrackingConfig
from pipeline.settings.errors import InputError
from pipeline.store.record import ROWS
from pipeline.store.search import chosen, existing, opened, stores
from pipeline.store.tracking import CONFIGURATION

TAGS = ("title", "table", "sweep", CONFIGURATION, "hash.document", "hardware")
KEPT = "budget.resolved"
COORDINATES = ("document", "layer", "head", "turn", "depth", "position", "frequency", "value")


def runs(*settings: str) -> pd.DataFrame:
    """The newest finished run of every configuration that fits.

    Parameters
    ----------
    settings : str
        As for `python -m pipeline.compare --runs`: `method=tri,snapkv`, `budget=512`, `table=paper`,
        `outputs=<folder>`, `tracking.uri=<store>`.

    Returns
    -------
    pd.DataFrame
        One line a run, by its id, the oldest first: `started`, the tags `title`, `table`, `sweep`, `identity`,
        `hash.document` and `hardware`, every parameter (`method.name`, `budget.resolved`, ...; numbers as numbers) and
        every metric (`ppl/kl`) with its 95 % interval (`ppl/kl_low`, `ppl/kl_high`). `budget.resolved` is a number of
        tokens in every run: all of the prompt, `document.tokens`, where the method keeps them all. `attrs["store"]`
        says where the runs are.

    Raises
    ------
    InputError
        If there is no store, or a setting is one that no run has logged.
    """
    found = chosen(list(settings))
    _, tracking, outputs = opened(stores(list(settings)))
    lines = [
        {
            "run_id": run.info.run_id,
            "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC),
            **{tag: run.data.tags.get(tag) for tag in TAGS},
            **run.data.params,
            **run.data.metrics,
        }
        for run in found
    ]
    frame = pd.DataFrame(lines, columns=None if lines else ["run_id"]).set_index("run_id")
    frame.attrs["store"] = {"uri": tracking.uri, "experiment": tracking.experiment, "outputs": str(outputs)}
    if KEPT in frame:
        frame[KEPT] = frame[KEPT].mask(frame[KEPT] == "all", frame.get("document.tokens"))
    for name in {name for run in found for name in run.data.params}:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if numbers.notna().equals(frame[name].notna()):
            frame[name] = numbers
    return frame


def rows(runs: pd.DataFrame) -> pd.DataFrame:
    """Every recorded value of runs, one line a value.

    Parameters
    ----------
    runs : pd.DataFrame
        As `runs` gives them, or a part of such a frame.

    Returns
    -------
    pd.DataFrame
        `run_id`, `title`, the coordinates `document`, `layer`, `head`, `turn`, `depth`, `position`, `frequency` (NaN
        where one does not apply), `metric`, `value`.

    Raises
    ------
    InputError
        If a run has lost its rows, or is not in the store that the frame is from.
    """
    if runs.empty:
        return pd.DataFrame(columns=["run_id", "title", *COORDINATES[:-1], "metric", "value"])
    where = runs.attrs.get("store")
    if where is None:
        raise InputError("the frame does not say which store it is from: give rows() what runs() gave, or a part of it")
    mlflow = existing(TrackingConfig(where["uri"], where["experiment"]), Path(where["outputs"]))
    try:
        table = mlflow.load_table(ROWS, run_ids=list(runs.index), extra_columns=["run_id"])
    except (mlflow.MlflowException, OSError) as error:
        raise InputError(f"a run has lost its {ROWS} ({error}): python -m pipeline.doctor names it") from None
    if missing := sorted(set(runs.index) - set(table["run_id"])):
        raise InputError(
            f"run {missing[0]} is not in the store of {where['outputs']}, or lost its {ROWS}: call runs() again"
        )
    numbers = {name: pd.to_numeric(table[name]) for name in COORDINATES}
    table = table.assign(**numbers, title=table["run_id"].map(runs["title"]))
    return table[["run_id", "title", *COORDINATES[:-1], "metric", "value"]]
