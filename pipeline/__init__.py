"""The experiment pipeline: it needs more than the library, which works without it."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_MISSING = [name for name in ("hydra", "mlflow", "pandas", "matplotlib") if find_spec(name) is None]
if _MISSING:
    _REMEDY = f"the experiment pipeline needs {', '.join(_MISSING)}: pip install 'spectral-kv[pipeline]'"
    if Path(sys.argv[0]).name in ("-m", "spectral-kv"):  # `python -m pipeline` and the installed command
        print(f"pipeline: {_REMEDY}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_REMEDY)

# Threads of torch that wait sleep. By default they spin, and with as many threads as cores a barrier then lasts until
# the scheduler has put off whoever else computes. Read when OpenMP's library is loaded, so before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def runs(*settings: str) -> "pd.DataFrame":
    """Finished runs that fit settings such as `method=tri,snapkv` or `table=paper`, one line a run.

    See `pipeline.store.frames.runs`.
    """
    from pipeline.store import frames  # MLflow takes seconds to import

    return frames.runs(*settings)


def rows(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Every recorded value of such runs, by document, layer, head, turn.

    See `pipeline.store.frames.rows`.
    """
    from pipeline.store import frames

    return frames.rows(runs)
