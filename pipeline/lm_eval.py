"""Results of lm-evaluation-harness as runs beside the experiments.

    python -m spectral_kv.lm_eval --model spectral_kv --model_args ... --tasks ... --output_path results
    python -m pipeline.lm_eval results/*/results_*.json

Every file becomes an MLflow run with its scores (`lm_eval/<task>/<metric>`), the evicted tokens, and the file itself.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed, spelled_out
from pipeline.settings.config import TrackingConfig, typed
from pipeline.settings.errors import InputError
from pipeline.store import tracking
from pipeline.store.record import tracked


def read(path: Path) -> dict:
    """What a file of results holds."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["results"], dict) or not isinstance(found["config"], dict):
            raise KeyError("results")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} does not hold results of lm_eval: give a results_*.json that --output_path received"
        ) from None
    return found


def metrics(found: dict) -> dict[str, float]:
    """Scores by task, metric and filter, and what was evicted."""
    named = {}
    for task, scores in found["results"].items():
        for key, value in scores.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool):
                part = "" if filtered in ("", "none") else f"/{filtered}"
                named[f"lm_eval/{task}/{name}{part}"] = float(value)
    for kind, counts in found["config"].get("spectral_kv", {}).items():
        if isinstance(counts, dict):
            named |= {f"lm_eval/{kind}/{name}": float(value) for name, value in counts.items()}
    return named


def log(path: Path, settings: TrackingConfig, outputs: Path) -> str:
    """Record a file of results; returns the id of its run."""
    found = read(path)
    config = found["config"]
    made = {k: v for k, v in config.get("spectral_kv", {}).items() if not isinstance(v, dict)}
    params = {f"lm_eval.{k}": config.get(k) for k in ("model", "model_args", "batch_size", "limit")} | made
    mlflow = tracking.connect(settings, outputs)
    name = f"lm_eval-{made.get('method', config.get('model'))}-{made.get('budget') or made.get('ratio') or 'all'}"
    with tracked(mlflow, name, params, tracking.environment()) as record, TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / path.name)
        record.log(Path(folder), metrics(found), {})
    return record.run_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="results.json")
    parser.add_argument("--settings", nargs="*", default=[], help="as for python -m pipeline: outputs, tracking")
    arguments = parser.parse_args()
    with reporting(arguments.settings):
        cfg = composed(spelled_out(arguments.settings))
        outputs = Path(OmegaConf.select(cfg, "outputs")).resolve()
        settings = typed(TrackingConfig, cfg.tracking, "tracking")
        for path in arguments.files:
            read(path)  # all of them before any is recorded
        for path in arguments.files:
            print(f"{path}: run {log(path, settings, outputs)} in {tracking.store_uri(settings, outputs)}")


if __name__ == "__main__":
    main()
