"""A saved view of the UI's list of runs: methods beside their metrics without a column to be chosen.

MLflow's list begins without metrics, and no setting of a run or an experiment changes that. A view that was saved in
the UI is a tag of the experiment, so one is saved for everybody. It stands under Views, and has a link of its own:
`#/experiments/<id>/runs?viewStateShareKey=methods`.
"""

import base64
import json
import zlib

from pipeline.store.shared import insert

TAG = "mlflow.sharedViewState.methods"
NAME = "Methods side by side"
COLUMNS = (
    "params.`budget.resolved`", "params.`storage.name`", "metrics.`memory/ratio`", "metrics.`aop/mean`",
    "metrics.`ppl/nd`", "metrics.`ppl/kl`", "metrics.`ppl/top1`",
)  # fmt: skip


def saved() -> str:
    """The view as the UI of MLflow 3.17 writes it; another release that can't read it shows its own list."""
    # sorted by a metric the list is flat; by time, what was measured by a sweep is folded under it
    state = {
        "searchFilter": "tags.method != ''", "orderByKey": "metrics.`ppl/kl`", "orderByAsc": True, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS), "columnOrder": [], "columnWidths": {}, "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False, "runListHidden": False, "isAccordionReordered": False,
        "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None, "groupsExpanded": {},
    }  # fmt: skip
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def offer(mlflow, experiment) -> None:
    """Save the view in an experiment that does not have it."""
    if TAG not in experiment.tags:
        insert(mlflow.MlflowClient().set_experiment_tag, experiment.experiment_id, TAG, saved())
