"""One job, from prefill to MLflow."""

import hashlib
import importlib
import time
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from safetensors import SafetensorError

from pipeline import tracking
from pipeline.aggregate import Estimate, aggregate, per_turn
from pipeline.checkpoint import Checkpoint, Weightless
from pipeline.config import BackendConfig, Settings
from pipeline.errors import InputError
from pipeline.job import NOT_IDENTITY, Job
from pipeline.phases.base import Context
from pipeline.progress import progress
from pipeline.stages.compress import Compressor, foresees, observed
from pipeline.stages.prefill import FullRuns
from spectral_kv.backends.base import Backend
from spectral_kv.scorers.base import Scorer

ROW_COLUMNS = ["document", "layer", "head", "turn", "depth", "position", "frequency", "metric", "value"]

# Module state on purpose: the jobs of a sweep run in one process and share the model and the prefills.
_full_runs = FullRuns()
_loaded: dict[tuple, Backend] = {}


@dataclass(frozen=True)
class Result:
    """What a run found, and where MLflow has it."""

    run_id: str
    metrics: dict[str, float]
    title: str
    budget: int | None
    storage: str
    model: str
    documents: str
    reads: str
    store: str
    reused: bool

    def estimate(self, metric: str) -> Estimate | None:
        """A metric with its interval, or None if the run did not measure it."""
        if metric not in self.metrics:
            return None
        return Estimate(
            self.metrics[metric], self.metrics.get(f"{metric}_low", np.nan), self.metrics.get(f"{metric}_high", np.nan)
        )


def _backend_class(config: BackendConfig) -> type[Backend]:
    module, _, name = config._target_.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise InputError(f"backend._target_={config._target_} is not there: write the full path of a class") from None


def _identity(job: Job) -> str:
    """The job's identity on this machine: what `auto` stands for decides how results round."""
    config = job.settings.backend
    device, dtype = _backend_class(config).place(config.device, config.dtype)
    kind = device.partition(":")[0]
    return hashlib.sha256(f"{job.identity} {kind} {dtype}".encode()).hexdigest()[:24]


def loaded(settings: Settings, checkpoint: Checkpoint | Weightless) -> tuple[tuple, Backend]:
    """The loaded model and what identifies it; one at a time is kept."""
    config = settings.backend
    key = (checkpoint.hash, config._target_, config.device, config.dtype, config.cache_dtype)
    if key not in _loaded:
        _loaded.clear()
        _full_runs.clear()
        backend = _backend_class(config)
        try:
            _loaded[key] = backend(
                checkpoint.source, device=config.device, dtype=config.dtype, cache_dtype=config.cache_dtype
            )
        except (ValueError, OSError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"model={settings.model.name} can't be loaded: {reason}") from None
    return key, _loaded[key]


def _flat(node: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def reads(scorer: Scorer | None) -> str:
    """What a scorer looks at, for people; an oracle says that it is one."""
    if scorer is None:
        return "nothing: it keeps every token"
    words = ", ".join(scorer.reads) or "nothing"
    return f"{words} (an oracle: an upper bound, not a method)" if foresees(scorer) else words


def _result(job: Job, run_id: str, metrics: dict[str, float], reused: bool) -> Result:
    settings = job.settings
    documents = settings.documents
    return Result(
        run_id, metrics, settings.method.title,
        job.budget.tokens if job.budget else None,
        settings.storage_name, settings.model.name,
        f"{documents.count} x {documents.tokens} + {documents.continuation} tokens of {documents.source}",
        reads(settings.method.scorer), tracking.store_uri(settings.tracking, settings.outputs), reused,
    )  # fmt: skip


def measure(job: Job) -> tuple[pd.DataFrame, dict[str, float]]:
    """Prefill, compress and measure every document: tidy rows, and the metrics of the run itself."""
    settings = job.settings
    key, backend = loaded(settings, job.checkpoint)
    limit = int(settings.prefill_memory_gb * 1e9)
    rows, computed, prefill_seconds, compress_seconds = [], 0, [], []
    label = f"{settings.method.title} {job.budget.tokens if job.budget else ''}".strip()
    compressor = Compressor(backend, settings.method.scorer, job.budget, settings.storage, job.statistics)
    observe = observed(compressor.scorer, settings.documents.tokens)
    for index, window in enumerate(progress(job.windows, label)):
        full, fresh = _full_runs.get(key, backend, window, settings.documents.tokens, observe, limit)
        computed += fresh
        prefill_seconds.append(full.seconds)
        compressed = compressor.compress(full, index)
        compress_seconds.append(compressed.seconds)
        context = Context(backend, full, compressed, compressor, index, job.lookups[index])
        for phase in settings.phases.values():
            rows += [{"document": index} | row for row in phase.measure(context)]
    timing = {
        "prefill/computed": float(computed),
        "prefill/reused": float(len(job.windows) - computed),
        "time/prefill_s": float(np.median(prefill_seconds)),
        "time/compress_s": float(np.median(compress_seconds)),
    }
    return pd.DataFrame(rows).reindex(columns=ROW_COLUMNS), timing


def execute(job: Job) -> Result:
    """Measure a job and record it; a finished run of the same identity is returned instead unless `force` is set."""
    settings = job.settings
    mlflow = tracking.connect(settings.tracking, settings.outputs)
    identity = _identity(job)
    if not settings.force and (run := tracking.find_finished(mlflow, settings.tracking.experiment, identity)):
        return _result(job, run.info.run_id, dict(run.data.metrics), reused=True)

    params = _flat({k: v for k, v in job.resolved.items() if k not in NOT_IDENTITY})
    params["budget.resolved"] = job.budget.tokens if job.budget else "all"
    params["method.reads"] = reads(settings.method.scorer)
    tags = tracking.environment() | {
        tracking.CONFIGURATION: identity,
        "hash.model": job.checkpoint.hash,
        "hash.document": job.document_hash,
        "hash.code": job.code_hash,
        "method": settings.method.name,
        "title": settings.method.title,
    }
    name = f"{settings.method.name}-{params['budget.resolved']}-{settings.storage_name}-{settings.model.name}"
    with tracking.tracked(mlflow, name, params, tags) as run_id:
        start = time.perf_counter()
        mlflow.log_text(OmegaConf.to_yaml(OmegaConf.create(job.resolved)), "config.yaml")
        rows, metrics = measure(job)
        for metric, value in aggregate(rows).items():
            metrics[metric] = value.mean
            metrics |= {
                f"{metric}_{bound}": v for bound, v in asdict(value).items() if bound != "mean" and np.isfinite(v)
            }
        if bad := sorted(name for name, value in metrics.items() if not np.isfinite(value)):
            raise RuntimeError(f"{', '.join(bad)} came out as not a number; the run is not counted as finished")
        metrics["time/total_s"] = time.perf_counter() - start
        mlflow.log_table(rows.astype(object).where(rows.notna(), None), "rows.json")
        mlflow.log_metrics(metrics)
        for turn, estimates in per_turn(rows).items():
            mlflow.log_metrics({metric: value.mean for metric, value in estimates.items()}, step=turn)
    return _result(job, run_id, metrics, reused=False)
