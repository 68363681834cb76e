"""A configuration made ready to run: checked, its contents read and hashed. Nothing heavy is imported here."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from pipeline.documents.base import Asked, Documents, content_hash
from pipeline.documents.book import Calibration
from pipeline.documents.mixed import Mixed
from pipeline.settings.config import MLX, BackendConfig, Settings, check, prefixed, resolved
from pipeline.settings.errors import InputError
from pipeline.sources import code_fingerprint
from pipeline.stages.checkpoint import Checkpoint, Weightless, locate
from pipeline.store.tracking import writable
from spectral_kv.calibration import QueryStatistics
from spectral_kv.codec.bases import Bases
from spectral_kv.compressor import repeats
from spectral_kv.scorers.ridge_kvzap import KVzapWeights, RidgeKVzap
from spectral_kv.selection import Budget
from spectral_kv.storage.base import Storage
from spectral_kv.storage.dense import Dense

# Packages whose version may change a result, and those of one backend or one quantiser.
DECISIVE = ("torch", "transformers", "numpy", "PyWavelets", "scipy")
DECISIVE_FOR = {MLX: ("mlx", "mlx-lm"), "quanto": ("optimum-quanto",), "hqq": ("hqq",)}
# What decides where a result is written or how it is computed, not what it is; contents are hashed instead of paths.
NOT_IDENTITY = {
    "outputs",
    "checkpoints",
    "tracking",
    "force",
    "prefill_memory_gb",
    "prefill_cache_gb",
    "prefill_cache_least_s",
    "grid",
}
SEPARATOR = "; "  # between the names of the texts that a file was measured on
WEIGHTLESS = "pipeline.synthetic.backend.SyntheticBackend"  # the backend of models without weights

version = cache(metadata.version)  # a document's jobs ask for the same few, and each answer takes a millisecond
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class Job:
    """A checked configuration with the contents it names, and the hash of all that determines its result."""

    settings: Settings
    checkpoint: Checkpoint | Weightless
    budget: Budget | None  # None: the method keeps every token
    windows: list[np.ndarray]
    lookups: list[list[Asked]]  # of every window
    statistics: QueryStatistics | None
    resolved: dict
    digest: str
    document_hash: str
    code_hash: str
    versions: dict[str, str]  # of the packages that may change a result


def not_installed(backend: BackendConfig, reason: object) -> InputError:
    """What to do about a backend whose packages are missing."""
    remedy = "pip install 'spectral-kv[mlx]'" if backend._target_ == MLX else "install its packages"
    return InputError(f"backend={backend.name} can't be imported ({reason}): {remedy}, or choose backend=torch")


def _versions(backend: BackendConfig, storage: Storage) -> dict[str, str]:
    chosen = (backend._target_, getattr(storage, "library", None))
    try:
        return {name: version(name) for name in (*DECISIVE, *(p for key in chosen for p in DECISIVE_FOR.get(key, ())))}
    except PackageNotFoundError as error:
        raise not_installed(backend, f"no package {error.name}") from None


def timing_note(backend: BackendConfig) -> str | None:
    """What has to be said beside the times that a backend takes on this machine."""
    if backend._target_ == MLX and sys.platform != "darwin":
        return f"times of MLX on {sys.platform} are not representative of Apple silicon"
    return None


def _agrees(settings: Settings, checkpoint: Checkpoint | Weightless) -> None:
    """Refuse a backend or a phase that is for another sort of model."""
    model, backend, weightless = settings.model.name, settings.backend, isinstance(checkpoint, Weightless)
    if weightless and backend._target_ != WEIGHTLESS:
        raise InputError(
            f"model={model} has no weights that backend={backend.name} could load: choose backend=synthetic, "
            "and document=synthetic phase=[memory,perturbation,planted] with it"
        )
    if not weightless and backend._target_ == WEIGHTLESS:
        raise InputError(
            f"backend={backend.name} makes keys and values up and can't load model={model}: "
            "choose model=synthetic, or backend=torch"
        )
    if backend._target_ == MLX and getattr(settings.storage, "torch_only", False):
        raise InputError(
            f"storage={settings.storage_name} holds torch tensors alone: choose storage=turboquant_4bit with "
            f"backend={backend.name}, or backend=torch"
        )
    if backend._target_ == MLX and settings.budget is not None and settings.budget.allocation in ("head", "global"):
        raise InputError(
            f"budget.allocation={settings.budget.allocation} gives KV heads of a layer different numbers of tokens, "
            f"which backend={backend.name} can't hold: choose layer or uniform, or backend=torch"
        )
    if backend._target_ == MLX and settings.refit is not None:
        raise InputError(
            f"refit={settings.refit.kind} adds a bias to attention, which backend={backend.name} does not: "
            "choose refit=none, or backend=torch"
        )
    scorer, method = settings.method.scorer, settings.method.name
    if weightless and scorer is not None and {"projection", "repetition"} & set(scorer.reads):
        raise InputError(
            f"method={method} needs a model that repeats its prompt or has a W_O, and model={model} has no weights: "
            "choose another method, or another model and backend"
        )
    for name, phase in settings.phases.items():
        if repeats(scorer) and getattr(phase, "recompresses", False):
            raise InputError(
                f"phase.{name} brings a cache that has grown back to its budget, and method={method} scores a whole "
                f"prompt while it is repeated: choose another method, leave the phase out, or let the cache grow"
            )
        if scorer is not None and getattr(settings.storage, "weighs", False) and getattr(phase, "recompresses", False):
            raise InputError(
                f"phase.{name} brings a cache that has grown back to its budget, and storage={settings.storage_name} "
                "keeps every token: choose method=full, leave the phase out, or let the cache grow"
            )
        if weightless and getattr(phase, "predicts", False):
            raise InputError(
                f"phase.{name} needs a model that predicts tokens, and model={model} has no weights: "
                "choose phase=[memory,perturbation,planted], or another model and backend"
            )
        if not weightless and getattr(phase, "seeks", False):
            raise InputError(
                f"phase.{name} looks for tokens that the model itself planted, and model={model} plants none: "
                "choose model=synthetic backend=synthetic document=synthetic, or leave the phase out"
            )


def provenance(job: Job) -> dict[str, str]:
    """What a file that is measured on a job's documents says of them."""
    documents = job.settings.documents
    return {"text": documents.source, "texts": SEPARATOR.join(sorted(documents.made_of()))}


def _measured_on(metadata: dict[str, str], documents: Documents) -> str | None:
    """A text that a file was measured on and that the documents are cut from, too; None if there is none.

    Files of before `texts` was written name the kind of their documents alone.
    """
    kinds = {kind.source: kind() for kind in (Calibration, Mixed)}
    text = metadata.get("text")
    written = metadata["texts"].split(SEPARATOR) if "texts" in metadata else [text]
    of_the_kind = kinds[text].made_of() if text in kinds else frozenset()
    return min((of_the_kind | set(written)) & documents.made_of(), default=None)


def _statistics(settings: Settings, checkpoint: Checkpoint | Weightless) -> QueryStatistics | None:
    scorer, model = settings.method.scorer, settings.model
    if scorer is None or "calibration" not in scorer.reads:
        return None
    if isinstance(checkpoint, Weightless):
        return checkpoint.source.statistics()
    remedy = f"run `python -m pipeline.calibrate model={model.name}` and set model.calibration=<the file it writes>"
    if model.calibration is None:
        raise InputError(
            f"method={settings.method.name} reads calibrated query statistics and model={model.name} has none: {remedy}"
        )
    if not Path(model.calibration).is_file():
        raise InputError(f"model.calibration={model.calibration} is not a file: {remedy}")
    shape = checkpoint.shape
    try:
        statistics = QueryStatistics.load(model.calibration, (shape.layers, shape.query_heads, shape.dim // 2))
    except ValueError as error:
        raise InputError(f"model.calibration: {error}; {remedy}") from None
    measured_on = statistics.metadata
    if measured_on.get("model", checkpoint.hash) != checkpoint.hash:  # the authors' files name no hash
        raise InputError(
            f"model.calibration={model.calibration} was measured on other weights (hash {measured_on['model']}) than "
            f"those of model={model.name} ({checkpoint.hash}): {remedy}"
        )
    if text := _measured_on(measured_on, settings.documents):
        raise InputError(
            f"model.calibration={model.calibration} was measured on {text}, "
            "which is also what the documents are cut from: choose another document, or calibrate on another text"
        )
    return statistics


def _bases(settings: Settings, checkpoint: Checkpoint | Weightless) -> Bases | None:
    """The bases that the storage reads, checked against the model and the documents."""
    storage, model, name = settings.storage, settings.model.name, settings.storage_name
    if not hasattr(storage, "read"):
        return None
    if isinstance(checkpoint, Weightless):
        raise InputError(
            f"storage={name} reads bases that were measured on a model's text, and model={model} reads none: "
            "choose storage=turboquant_4bit, or another model"
        )
    if settings.method.scorer is not None and not getattr(storage, "weighs", False):
        raise InputError(
            f"storage={name} keeps every token, and method={settings.method.name} evicts: "
            "choose method=full, or another storage"
        )
    remedy = f"run `python -m pipeline.bases model={model}` and set storage.bases=<the file it writes>"
    if storage.bases is None:
        raise InputError(f"storage={name} reads bases of the model and model={model} has none: {remedy}")
    key = "model.bases" if storage.bases == getattr(settings.model, "bases", None) else "storage.bases"
    if not Path(storage.bases).is_file():
        raise InputError(f"{key}={storage.bases} is not a file: {remedy}")
    shape = checkpoint.shape
    try:
        bases = storage.read((shape.layers, shape.kv_heads, shape.dim), checkpoint.hash)
    except ValueError as error:
        raise InputError(f"{key}: {error}; {remedy}") from None
    if text := _measured_on(bases.metadata, settings.documents):
        raise InputError(
            f"{key}={storage.bases} was measured on {text}, "
            "which is also what the documents are cut from: choose another document, or measure on another text"
        )
    return bases


def _maps(settings: Settings, checkpoint: Checkpoint | Weightless) -> KVzapWeights | None:
    """The maps that the method reads, checked against the model and the documents."""
    scorer, model, name = settings.method.scorer, settings.model.name, settings.method.name
    if not isinstance(scorer, RidgeKVzap):
        return None
    remedy = f"run `python -m pipeline.calibrate --kvzap model={model}` and set method.weights=<the file it writes>"
    if scorer.weights is None:
        raise InputError(f"method={name} reads maps that were fitted to the model and model={model} has none: {remedy}")
    if not Path(scorer.weights).is_file():
        raise InputError(f"method.weights={scorer.weights} is not a file: {remedy}")
    try:
        maps = scorer.fitted
    except ValueError as error:
        raise InputError(f"method.weights: {error}; {remedy}") from None
    if isinstance(checkpoint, Weightless) or maps.metadata.get("model") != checkpoint.hash:
        raise InputError(f"method.weights={scorer.weights} was fitted to other weights than model={model}: {remedy}")
    if text := _measured_on(maps.metadata, settings.documents):
        raise InputError(
            f"method.weights={scorer.weights} was fitted to {text}, "
            "which is also what the documents are cut from: choose another document, or fit to another text"
        )
    return maps


def _budget(settings: Settings, checkpoint: Checkpoint | Weightless) -> Budget | None:
    shape = checkpoint.shape
    itemsize = ITEMSIZE[settings.backend.cache_dtype]

    given = 0 if settings.refit is None else settings.refit.token_nbytes * shape.layers * shape.kv_heads

    def held_in(storage: Storage) -> Callable[[int], int]:
        if together := getattr(storage, "nbytes_together", None):
            return lambda tokens: together(tokens, shape.layers, shape.kv_heads, shape.dim, itemsize)
        return lambda tokens: shape.layers * storage.nbytes(tokens, shape.kv_heads, shape.dim, itemsize)

    def refitted(tokens: int) -> int:
        return held_in(settings.storage)(tokens) + given * tokens

    try:
        held_in(settings.storage)(settings.documents.tokens)
    except ValueError as error:  # a storage may not suit the shape of the model
        raise InputError(prefixed(str(error), "storage", (f.name for f in fields(settings.storage)))) from None
    if settings.budget is None:
        return None
    return settings.budget.resolve(settings.documents.tokens, held_in(Dense()), refitted)


def prepare(cfg: DictConfig | dict) -> Job:
    """Check a configuration, composed or resolved, and read what it names, without loading a framework.

    Raises
    ------
    InputError
        Names the key and the remedy.
    """
    cfg = resolved(cfg)
    settings = check(cfg)
    writable(settings.outputs)
    checkpoint = locate(
        settings.model, settings.checkpoints, settings.documents.tokens, settings.documents.continuation
    )
    _agrees(settings, checkpoint)
    bos = checkpoint.bos() if settings.model.bos else None
    windows = settings.documents.windows(checkpoint.tokenizer, bos, checkpoint.chat)
    lookups = settings.documents.lookups(checkpoint.tokenizer, bos, checkpoint.chat)
    for name, phase in settings.phases.items():
        if getattr(phase, "asks", False) and not any(lookups):
            raise InputError(
                f"phase.{name} asks for what was planted in the prompt, and document={cfg['document']['name']} plants "
                "nothing: choose document=needles, or leave the phase out"
            )
    statistics = _statistics(settings, checkpoint)
    bases = _bases(settings, checkpoint)
    maps = _maps(settings, checkpoint)
    budget = _budget(settings, checkpoint)
    what = {k: v for k, v in cfg.items() if k not in NOT_IDENTITY}
    what["model"] = checkpoint.hash
    what["document"] = document_hash = content_hash(
        [*windows, *(tokens for asked in lookups for one in asked for tokens in (one.question, one.answer))]
    )
    what["prompt"] = settings.documents.tokens
    what["versions"] = versions = _versions(settings.backend, settings.storage)
    what["code"] = code_hash = code_fingerprint(
        settings.backend._target_, settings.method.scorer, settings.storage, settings.refit, *settings.phases.values()
    )
    what["budget"] = asdict(budget) if budget else None
    if bases is not None:
        what["storage"] = what["storage"] | {"bases": bases.digest}  # wherever the file lies
    if maps is not None:
        what["method"] = what["method"] | {"weights": maps.digest}
    if statistics is not None:
        what["statistics"] = statistics.digest
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    return Job(
        settings, checkpoint, budget, windows, lookups, statistics, cfg, digest, document_hash, code_hash,
        versions,
    )  # fmt: skip
