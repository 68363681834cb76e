"""One job, from prefill to MLflow."""

import hashlib
import importlib
import inspect
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from safetensors import SafetensorError

from pipeline.documents.base import tokenized
from pipeline.job import NOT_IDENTITY, Job, not_installed, timing_note
from pipeline.phases.base import Context
from pipeline.settings.config import BackendConfig, Settings, prefixed
from pipeline.settings.errors import InputError, exhausted
from pipeline.show.progress import progress
from pipeline.stages.audit import audited
from pipeline.stages.checkpoint import Checkpoint, Weightless
from pipeline.stages.compress import compress, remembered
from pipeline.stages.fast_blas import fast_blas
from pipeline.stages.prefill import FullRuns
from pipeline.stages.prefill_cache import PrefillCache
from pipeline.statistics import Estimate, aggregate, per_turn
from pipeline.store import sweeps, tracking
from pipeline.store.record import ROWS, tracked
from spectral_kv.backends.measuring import MeasuredBackend
from spectral_kv.compressor import Compressor, foresees, repeats
from spectral_kv.scorers.base import Scorer
from spectral_kv.xp import to_numpy

ROW_COLUMNS = ["document", "layer", "head", "turn", "depth", "position", "frequency", "metric", "value"]

# Module state on purpose: the jobs of a sweep run in one process and share the model and the prefills.
_full_runs = FullRuns()
_loaded: dict[tuple, MeasuredBackend] = {}


@dataclass(frozen=True)
class Result:
    """What a run found, and where MLflow has it."""

    run_id: str
    metrics: dict[str, float]
    title: str
    budget: int | None
    storage: str
    backend: str
    model: str
    documents: str
    reads: str
    store: str
    reused: bool
    timing_note: str | None = None
    allocation: str = "uniform"
    refit: str = "none"

    @property
    def further(self) -> list[str]:
        """What its budget and its tokens have that is not the default."""
        return [x for x, default in ((self.allocation, "uniform"), (self.refit, "none")) if x != default]

    def estimate(self, metric: str) -> Estimate | None:
        """A metric with its interval, or None if the run did not measure it."""
        if metric not in self.metrics:
            return None
        return Estimate(
            self.metrics[metric], self.metrics.get(f"{metric}_low", np.nan), self.metrics.get(f"{metric}_high", np.nan)
        )


def _backend_class(config: BackendConfig) -> type[MeasuredBackend]:
    module, _, name = config._target_.rpartition(".")
    if getattr(config, "fast_blas", False):
        fast_blas()
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise not_installed(config, error) from None
    except AttributeError:
        raise InputError(f"backend._target_={config._target_} is not there: write the full path of a class") from None


def placed(config: BackendConfig) -> tuple[str, str]:
    """The device and dtype that `auto` stands for on this machine."""
    return _backend_class(config).place(config.device, config.dtype)


def hardware(device: str) -> str:
    """What a device is, as far as results depend on it: the kind, and of a CUDA device the model of the GPU."""
    kind = device.partition(":")[0]
    if kind != "cuda":
        return kind
    import torch

    return f"{kind} {torch.cuda.get_device_name(device)}" if torch.cuda.is_available() else kind


def identity(job: Job, place: tuple[str, str] | None = None) -> str:
    """The job's identity on this machine, or at another place: what `auto` stands for decides how results round."""
    device, dtype = place or placed(job.settings.backend)
    return hashlib.sha256(f"{job.digest} {hardware(device)} {dtype}".encode()).hexdigest()[:24]


def _refuse_code(name: str, checkpoint: Checkpoint | Weightless) -> None:
    """Refuse a checkpoint that can only be read by code of its own.

    Asked here and not by transformers, which would ask the person at the keyboard whether to run it.
    """
    if isinstance(checkpoint, Weightless) or not {"auto_map", "model_file"} & set(checkpoint.config):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if checkpoint.config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"model={name} is of type {checkpoint.config.get('model_type')}, which only code in {checkpoint.folder} "
            "could load, and no code of a checkpoint runs here: choose a model that transformers knows"
        )


def loaded(settings: Settings, checkpoint: Checkpoint | Weightless) -> tuple[tuple, MeasuredBackend]:
    """The loaded model and what identifies it; one at a time is kept."""
    config = settings.backend
    key = (
        checkpoint.hash, config._target_, config.device, config.dtype, config.cache_dtype, config.chunk, config.engine,
    )  # fmt: skip
    if key not in _loaded:
        _refuse_code(settings.model.name, checkpoint)
        _loaded.clear()
        _full_runs.clear()
        backend = _backend_class(config)
        arguments = {"device": config.device, "dtype": config.dtype, "cache_dtype": config.cache_dtype}
        if config.engine is not None:
            arguments["engine"] = config.engine
        try:
            _loaded[key] = backend(checkpoint.source, **arguments)
        except (ValueError, OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "mismatch" not in str(error):
                raise
            fields = ("device", "dtype", "cache_dtype", "engine")
            reason = prefixed(str(error).strip().split("\n")[0], "backend", fields)
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
    return Result(
        run_id, metrics, settings.method.title,
        job.budget.tokens if job.budget else None,
        settings.storage_name, settings.backend.name, settings.model.title, _documents(job),
        reads(settings.method.scorer), tracking.store_uri(settings.tracking, settings.outputs), reused,
        timing_note(settings.backend), *_shared_out(job),
    )  # fmt: skip


def _shared_out(job: Job) -> tuple[str, str]:
    """Allocation of the budget and kind of the refit."""
    refit = job.settings.refit
    return job.budget.allocation if job.budget else "uniform", "none" if refit is None else refit.kind


def _documents(job: Job) -> str:
    documents = job.settings.documents
    return f"{documents.count} x {documents.tokens} + {documents.continuation} tokens of {documents.source}"


def _disk(job: Job) -> PrefillCache | None:
    """The prefills on disk that fit the model, the backend and where it computes."""
    settings = job.settings
    if settings.prefill_cache_gb == 0:
        return None
    config = settings.backend
    device, dtype = placed(config)
    source = Path(inspect.getfile(_backend_class(config))).read_bytes()
    what = {
        "model": job.checkpoint.hash, "backend": config._target_, "device": device.partition(":")[0], "dtype": dtype,
        "cache_dtype": config.cache_dtype, "chunk": config.chunk, "versions": job.versions,
        "source": hashlib.sha256(source).hexdigest(),
    }  # fmt: skip
    folder, limit = settings.outputs / "cache" / "prefill", int(settings.prefill_cache_gb * 1e9)
    return PrefillCache(folder, limit, settings.prefill_cache_least_s, what)


def encoding(checkpoint: Checkpoint | Weightless) -> Callable[[str], np.ndarray] | None:
    """What turns a text into token ids, for methods that have a prompt repeated."""
    if isinstance(checkpoint, Weightless) or checkpoint.tokenizer is None:
        return None
    return lambda text: tokenized(checkpoint.tokenizer, (text,))[0]


@dataclass(frozen=True)
class Measured:
    """What a job found.

    Parameters
    ----------
    rows : pd.DataFrame
        Tidy, with `ROW_COLUMNS`.
    timing : dict of str to float
        Metrics of the run itself.
    kept : list of list of np.ndarray, [kept], one a layer and KV head
        Tokens of the first document that were kept; empty if all were.
    """

    rows: pd.DataFrame
    timing: dict[str, float]
    kept: list[list[np.ndarray]]


def measure(job: Job) -> Measured:
    """Prefill, compress and measure every document."""
    settings = job.settings
    key, backend = loaded(settings, job.checkpoint)
    limit = int(settings.prefill_memory_gb * 1e9)
    rows, origins, kept = [], Counter(), []
    prefill_seconds, compress_seconds, repetition_seconds = [], [], []
    label = f"{settings.method.title} {job.budget.tokens if job.budget else ''}".strip()
    compressor = Compressor(
        backend, settings.method.scorer, job.budget, settings.storage, job.statistics, encoding(job.checkpoint),
        settings.refit,
    )  # fmt: skip
    chunk, disk = settings.backend.chunk, _disk(job)
    observe = remembered(compressor, settings.documents.tokens, chunk)
    for index, window in enumerate(progress(job.windows, label)):
        full, shared, origin = _full_runs.get(
            key, backend, window, settings.documents.tokens, observe, limit, disk, chunk
        )
        origins[origin] += 1
        prefill_seconds.append(full.seconds)
        compressed = compress(compressor, full, shared, index)
        compress_seconds.append(compressed.seconds)
        repetition_seconds.append(compressed.repetition)
        if index == 0 and compressed.kept is not None:
            kept = [[to_numpy(head) for head in layer] for layer in compressed.kept]
        rows += [
            {"document": index, "metric": metric, "value": value}
            for metric, value in audited(compressor, full, compressed).items()
        ]
        context = Context(backend, full, compressed, compressor, index, job.lookups[index])
        for phase in settings.phases.values():
            rows += [{"document": index} | row for row in phase.measure(context)]
    timing = {f"prefill/{origin}": float(origins[origin]) for origin in ("computed", "loaded", "reused")} | {
        "time/prefill_s": float(np.median(prefill_seconds)),
        "time/compress_s": float(np.median(compress_seconds)),
    }
    if repeats(compressor.scorer):
        timing["time/repetition_s"] = float(np.median(repetition_seconds))
        timing["time/repetition_prefills"] = float(np.median(np.divide(repetition_seconds, prefill_seconds)))
    return Measured(pd.DataFrame(rows).reindex(columns=ROW_COLUMNS), timing, kept)


def _metrics(measured: Measured) -> dict[str, float]:
    metrics = {}
    for metric, value in aggregate(measured.rows).items():
        metrics[metric] = value.mean
        metrics |= {f"{metric}_{bound}": v for bound, v in asdict(value).items() if bound != "mean" and np.isfinite(v)}
    metrics |= measured.timing  # last: the UI offers the first metric for its plots
    if bad := sorted(name for name, value in metrics.items() if not np.isfinite(value)):
        raise RuntimeError(f"{', '.join(bad)} came out as not a number; the run is not counted as finished")
    return metrics


def _write(job: Job, measured: Measured, folder: Path) -> None:
    """The artifacts of a run: its rows, its resolved configuration, its figures."""
    rows = measured.rows
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(job.resolved)))
    rows.astype(object).where(rows.notna(), None).to_json(folder / ROWS, orient="split", index=False)
    if not job.settings.tracking.figures:
        return
    from pipeline.show.maps import by_layer, kept_map

    figures = {"aop_by_layer": by_layer(rows, "aop/mean")}
    if measured.kept:
        figures["kept_tokens"] = kept_map(measured.kept, job.settings.documents.tokens)
    (folder / "figures").mkdir()
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / "figures" / f"{name}.png")


def _tags(job: Job, identity: str) -> dict[str, str]:
    settings = job.settings
    return {
        **tracking.environment(),
        **tracking.membership(settings.tracking),
        **{f"version.{name}": number for name, number in job.versions.items()},
        tracking.CONFIGURATION: identity,
        "hash.model": job.checkpoint.hash,
        "hash.document": job.document_hash,
        "hash.code": job.code_hash,
        "hardware": hardware(placed(settings.backend)[0]),
        "method": settings.method.name,
        "title": settings.method.title,
        "timings": timing_note(settings.backend) or "of this machine",
        "mlflow.note.content": _note(job, {}),
    }


def _note(job: Job, metrics: dict[str, float]) -> str:
    """The description of a run: what it is, and what came out."""
    from pipeline.show.summary import described

    settings = job.settings
    budget = "all tokens" if job.budget is None else f"{job.budget.tokens} of {settings.documents.tokens} tokens"
    allocation, refit = _shared_out(job)
    budget += f", allocation {allocation}" * (allocation != "uniform") + f", refit {refit}" * (refit != "none")
    return (
        f"**{settings.method.title}**, {budget}, storage {settings.storage_name}, model {settings.model.title}.\n\n"
        f"{described(metrics)}"
        f"{_documents(job)}; the method reads {reads(settings.method.scorer)}.\n\n"
        f"Rows by document, layer and head: `{ROWS}`; settings: `config.yaml`; pictures: `figures/`."
    )


def execute(job: Job) -> Result:
    """Measure a job and record it; a finished run of the same identity is returned instead unless `force` is set.

    Raises
    ------
    Exhausted
        If the disk or the memory does not suffice.
    """
    settings = job.settings
    try:
        mlflow = tracking.connect(settings.tracking, settings.outputs)  # may refuse, before frameworks are loaded
        hashed = identity(job)
        with tracking.claim(settings.outputs, hashed):
            if not settings.force and (run := tracking.find_finished(mlflow, hashed)):
                tracking.join(mlflow, run, settings.tracking)
                return _result(job, run.info.run_id, dict(run.data.metrics), reused=True)
            return _recorded(job, mlflow, hashed)
    except Exception as error:
        reason = exhausted(error, settings.outputs)
        if reason is None:
            raise
        _full_runs.clear()  # the next job of a sweep may need less,
        traceback.clear_frames(error.__traceback__)  # and Hydra keeps the error, with all its frames, until the end
        raise reason from error


def _recorded(job: Job, mlflow, identity: str) -> Result:
    settings = job.settings
    params = _flat({k: v for k, v in job.resolved.items() if k not in NOT_IDENTITY})
    params["budget.resolved"] = job.budget.tokens if job.budget else "all"
    params["method.reads"] = reads(settings.method.scorer)
    name = f"{settings.method.name}-{params['budget.resolved']}-{settings.storage_name}-{settings.model.name}"
    tags = _tags(job, identity)
    if above := sweeps.parent(mlflow, settings.tracking, settings.outputs):
        tags[sweeps.NESTED] = above
    with tracked(mlflow, name, params, tags) as record, TemporaryDirectory() as folder:
        record.reads(_documents(job), job.document_hash, job.resolved["document"])
        start = time.perf_counter()
        measured = measure(job)
        metrics = _metrics(measured)
        _write(job, measured, Path(folder))
        metrics["time/total_s"] = time.perf_counter() - start
        turns = per_turn(measured.rows).items()
        by_turn = {turn: {m: v.mean for m, v in values.items()} for turn, values in turns}
        record.log(Path(folder), metrics, by_turn, _note(job, metrics))
    return _result(job, record.run_id, metrics, reused=False)
