"""From a composed configuration to checked objects, before anything heavy is loaded.

The classes that do the work are their own schemas: a `_target_` dataclass says which settings exist, of what type,
and refuses impossible values when it is made.
"""

import bisect
import importlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from pipeline.documents.base import Documents
from pipeline.settings.errors import InputError, suggestion
from pipeline.synthetic.model import SyntheticModel
from spectral_kv.refit import Refit
from spectral_kv.scorers.base import Scorer
from spectral_kv.selection import ALLOCATIONS, SELECTIONS, Budget
from spectral_kv.storage.base import Storage

DTYPES = ("float32", "bfloat16", "float16")
MLX = "spectral_kv.backends.mlx.MLXBackend"


@dataclass
class MethodConfig:
    """`method`: what a method is called; its own parameters are those of `_target_`."""

    name: str
    title: str
    scorer: Scorer | None  # None keeps every token


@dataclass(frozen=True)
class ModelConfig:
    """`model`: where a checkpoint is and how prompts for it begin."""

    name: str
    id: str | None
    revision: str | None
    path: str | None
    bos: bool
    calibration: str | None
    context: int | None = None  # positions that it was trained for
    weights: str | None = None  # what they were rounded to, where that is part of what the model is
    package: str | None = None  # of the Python package index, which holds the file that `path` names
    sha256: str | None = None  # of that file
    bases: str | None = None  # of its cache, for storage=spectral
    kvzap: str | None = None  # maps of method=ridge_kvzap

    def __post_init__(self):
        if (self.package is None) != (self.sha256 is None) or (self.package and self.path is None):
            raise ValueError(
                f"model={self.name}: model.package, model.sha256 and model.path belong together: give all three"
            )

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.name} ({self.weights} weights)" if self.weights else self.name


@dataclass
class SyntheticConfig:
    """`model` without a checkpoint: its own parameters are those of `_target_`."""

    name: str
    source: SyntheticModel

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name

    bos: ClassVar[bool] = False


@dataclass(frozen=True)
class BudgetConfig:
    """`budget`: see `spectral_kv.selection.Budget`; `bytes` or `ratio`, where set, win over `tokens`."""

    tokens: int | None
    ratio: float | None
    bytes: float | None
    sinks: int
    recent: int
    selection: str
    allocation: str = "uniform"
    safeguard: float = 0.2

    def __post_init__(self):
        if self.ratio is not None and self.bytes is not None:
            raise ValueError(f"budget.ratio={self.ratio} and budget.bytes={self.bytes} are both set: give one of them")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"budget.ratio={self.ratio} must lie above 0 and at most at 1")
        if self.tokens is None and self.ratio is None and self.bytes is None:
            raise ValueError("no budget is given: set budget.tokens, budget.ratio or budget.bytes")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"budget.sinks={self.sinks} and budget.recent={self.recent} can't be negative")
        if self.selection not in SELECTIONS:
            raise ValueError(f"budget.selection={self.selection} is not known: choose one of {', '.join(SELECTIONS)}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(
                f"budget.allocation={self.allocation} is not known: choose one of {', '.join(ALLOCATIONS)}"
            )
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"budget.safeguard={self.safeguard} must lie in [0, 1]")
        if self.allocation != "uniform" and self.selection != "per_layer_perhead":
            raise ValueError(
                f"budget.selection={self.selection} has all layers keep the same tokens, and "
                f"budget.allocation={self.allocation} different numbers of them: leave one of the two at its default"
            )
        if self.allocation != "uniform" and self.sinks + self.recent == 0:
            raise ValueError(
                f"budget.sinks={self.sinks} and budget.recent={self.recent} protect no token, and "
                f"budget.allocation={self.allocation} may leave a KV head without any: protect one at least"
            )
        if self.ratio is None and self.bytes is None:
            self._holds(self.tokens, f"budget.tokens={self.tokens}")

    def _holds(self, tokens: int, key: str) -> None:
        if tokens <= self.sinks + self.recent:
            raise ValueError(
                f"{key} leaves nothing to choose beside budget.sinks={self.sinks} and budget.recent={self.recent}: "
                f"give at least {self.sinks + self.recent + 1} tokens, or fewer sinks and recent tokens"
            )

    def resolve(self, prompt: int, dense: Callable[[int], int], held: Callable[[int], int]) -> Budget:
        """The budget for prompts of `prompt` tokens.

        Parameters
        ----------
        dense, held : function of a number of tokens
            Bytes that they take in 16 bits (or whatever the cache's dtype is), and in the chosen storage.
        """
        tokens, key = self.tokens, f"budget.tokens={self.tokens}"
        if self.bytes is not None or self.ratio is not None:
            key = f"budget.bytes={self.bytes:g}" if self.bytes is not None else f"budget.ratio={self.ratio}"
            limit = self.bytes if self.bytes is not None else dense(math.ceil(self.ratio * prompt))
            tokens = bisect.bisect_right(range(prompt + 1), limit, key=held) - 1
            key += f" buys {tokens} tokens of {prompt} in this storage, which"
            try:
                self._holds(tokens, key)
            except ValueError as error:
                raise InputError(str(error)) from None
        elif tokens > prompt:
            raise InputError(
                f"budget.tokens={tokens} is more than the document.tokens={prompt} tokens of a prompt: "
                "give at most as many, or choose method=full"
            )
        return Budget(tokens, self.sinks, self.recent, self.selection, self.allocation, self.safeguard)


@dataclass(frozen=True)
class BackendConfig:
    """`backend`: which class loads the model, and its arguments."""

    name: str
    _target_: str
    device: str
    dtype: str
    cache_dtype: str
    chunk: int | None = field(default=None, kw_only=True)
    engine: str | None = field(default=None, kw_only=True)  # None: the backend knows but one way to decode

    engines: ClassVar[tuple[str, ...]] = ("auto", "eager", "graph")
    devices: ClassVar[tuple[str, str]] = (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:<number>")

    def __post_init__(self):
        pattern, choices = self.devices
        if not re.fullmatch(pattern, self.device):
            raise ValueError(f"backend.device={self.device} is not known to backend={self.name}: choose {choices}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"backend.chunk={self.chunk} must be at least 1, or null to feed a prompt at once")
        if self.engine is not None and self.engine not in self.engines:
            raise ValueError(f"backend.engine={self.engine} is not known: choose one of {', '.join(self.engines)}")
        for name, choices in (("dtype", ("auto", *DTYPES)), ("cache_dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"backend.{name}={getattr(self, name)} is not known: choose one of {', '.join(choices)}"
                )


@dataclass(frozen=True)
class MLXConfig(BackendConfig):
    """`backend` for MLX, which numbers no GPUs and can be given another BLAS."""

    fast_blas: bool

    devices: ClassVar[tuple[str, str]] = (r"auto|cpu|gpu", "auto, cpu or gpu")


@dataclass(frozen=True)
class TrackingConfig:
    """`tracking`: the MLflow store."""

    uri: str | None
    experiment: str
    table: str | None = None
    sweep: str | None = None
    figures: bool = True

    def __post_init__(self):
        if not self.experiment.strip():
            raise ValueError("tracking.experiment is empty: give it a name")


@dataclass(frozen=True)
class GeneralConfig:
    """The settings that belong to no group."""

    seed: int
    outputs: str
    checkpoints: str
    force: bool
    prefill_memory_gb: float
    prefill_cache_gb: float
    prefill_cache_least_s: float

    def __post_init__(self):
        if not self.outputs.strip():
            raise ValueError("outputs is empty: set outputs=<a folder>")
        if odd := sorted(set("?#%") & set(self.outputs)):
            raise ValueError(
                f"outputs={self.outputs} has a {odd[0]} in it, "
                "which the address of a database can't have: choose another name"
            )
        for name in ("prefill_memory_gb", "prefill_cache_gb"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number of GB, 0 or more")


@dataclass
class Settings:
    """Everything a run needs to know, checked."""

    method: MethodConfig
    model: ModelConfig | SyntheticConfig
    budget: BudgetConfig | None  # None: the method keeps every token
    storage: Storage
    storage_name: str
    refit: Refit | None  # None: kept tokens stay as they are
    backend: BackendConfig
    documents: Documents
    phases: dict[str, Any]
    tracking: TrackingConfig
    outputs: Path
    checkpoints: Path
    seed: int
    force: bool
    prefill_memory_gb: float
    prefill_cache_gb: float
    prefill_cache_least_s: float


def _sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def prefixed(message: str, key: str, names: Iterable[str]) -> str:
    """A message of the library, which names bare parameters (`window=0 must be ...`), with the keys to set them by.

    Parameters
    ----------
    key : str
        Of the group that the parameters belong to: `method`, `storage`, `backend`, ...
    names : iterable of str
        The parameters. One that already has a prefix is left as it is.
    """
    bare = "|".join(sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])(?:{bare})=", lambda found: f"{key}.{found[0]}", message) if bare else message


def _possible(key: str, name: str, value: object) -> None:
    """Refuse numbers that no setting can mean."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key}={value} is no number to work with: give a finite one")
    if (name == "seed" or name.endswith("_seed")) and isinstance(value, int) and value < 0:
        raise InputError(f"{key}={value} can't be negative: give a seed of 0 or more")


def plain(node: DictConfig | dict) -> dict:
    """A part of a composed configuration with its references resolved; a dictionary has none."""
    return node if isinstance(node, dict) else OmegaConf.to_container(node, resolve=True)


def typed(cls: type, node: DictConfig | dict, key: str, option: str | None = None) -> Any:
    """An instance of dataclass `cls` from the node at `key` (of the chosen `option`).

    Unknown keys, wrong types and impossible values are refused. The jobs of a sweep share instances of frozen classes.
    """
    written = json.dumps(plain(node))
    return (_shared if cls.__dataclass_params__.frozen else _typed)(cls, written, key, option)


def _typed(cls: type, written: str, key: str, option: str | None) -> Any:
    known = [f.name for f in fields(cls)]
    values = json.loads(written)
    for name in values:
        if name not in known:
            whole = f"{key}={option}" if option else key
            raise InputError(f"{key}.{name} is not a setting of {whole}{suggestion(name, known)}")
    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    for name, value in values.items():
        _possible(f"{key}.{name}".removeprefix("."), name, value)
        try:
            schema[name] = value
        except OmegaConfBaseException as error:
            raise InputError(f"{key}.{name}={value} can't be used: {_sentence(error)}".removeprefix(".")) from None
    missing = OmegaConf.missing_keys(schema)
    if missing:
        raise InputError(f"{key}.{sorted(missing)[0]} has no value: set it on the command line".removeprefix("."))
    try:
        return OmegaConf.to_object(schema)
    except (ValueError, TypeError) as error:
        raise InputError(prefixed(_sentence(error), key, known) if key else _sentence(error)) from None


_shared = cache(_typed)


def target(node: dict, key: str, *extra: str) -> Any:
    """The object that a node with a `_target_` describes; keys in `extra` belong to the pipeline, not to the object."""
    path = str(node.get("_target_"))
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise InputError(f"{key}._target_={path} can't be imported: write the full path of a dataclass") from None
    if not is_dataclass(cls):
        raise InputError(f"{key}._target_={path} is not a dataclass")
    own = {k: v for k, v in node.items() if k not in ("_target_", *extra)}
    return typed(cls, own, key, node.get("name"))


def _model(node: dict) -> ModelConfig | SyntheticConfig:
    """A checkpoint, or with a `_target_` a model that needs none."""
    if "_target_" in node:
        return SyntheticConfig(_said(node, "model", "name"), target(node, "model", "name"))
    return typed(ModelConfig, node, "model")


def model_settings(cfg: DictConfig) -> ModelConfig:
    """The checked `model` of a composed configuration, which must be one with a checkpoint."""
    model = _model(plain(cfg.model))
    if isinstance(model, SyntheticConfig):
        raise InputError(f"model={model.name} has no checkpoint")
    return model


def _fits(scorer: Scorer | None, documents: Documents) -> None:
    """Refuse a scorer that looks at more queries, at more of the future or at longer waves than the documents have."""
    if scorer is None:
        return
    if "future" in scorer.reads and scorer.horizon > documents.continuation:
        raise InputError(
            f"method.horizon={scorer.horizon} tokens of the future are more than "
            f"document.continuation={documents.continuation}: lower the former, or raise the latter"
        )
    levels = getattr(scorer, "levels", 0)
    if isinstance(levels, int) and 2**levels > documents.tokens:
        raise InputError(
            f"method.levels={levels} looks for changes over 2^{levels} tokens and document.tokens={documents.tokens}: "
            f"give at most {documents.tokens.bit_length() - 1} levels, or longer documents"
        )
    if "queries" not in scorer.reads or scorer.window is None:
        return
    if scorer.window >= documents.tokens:
        raise InputError(
            f"method.window={scorer.window} is the whole prompt of document.tokens={documents.tokens}: lower the former"
        )


def resolved(cfg: DictConfig | dict) -> dict:
    """A composed configuration with its references resolved; a dictionary has none.

    Raises
    ------
    InputError
        If the method's title is made of what the storage has not got.
    """
    try:
        return plain(cfg)
    except InterpolationKeyError:
        try:
            _ = cfg.method.title
        except InterpolationKeyError as error:
            lacking = re.search(r"'([\w.]+)'", str(error))
            raise InputError(
                f"method={cfg.method.name} is named by {lacking[1] if lacking else 'the storage'}, which "
                f"storage={cfg.storage.name} does not have: "
                "choose storage=turboquant_4bit, or method=full with this storage"
            ) from None
        raise


def _said(node: dict, group: str, key: str) -> Any:
    """What an option says for a key that every option of its group has."""
    if key not in node:
        raise InputError(f"{group}.{key} is missing: write it into the option's file, or +{group}.{key}=<value>")
    return node[key]


def check(cfg: DictConfig | dict) -> Settings:
    """Turn a composed configuration, or what `resolved` made of it, into checked settings.

    Raises
    ------
    InputError
        Names the key and the remedy.
    """
    cfg = resolved(cfg)
    method, storage, backend = cfg["method"], cfg["storage"], cfg["backend"]
    name, title = _said(method, "method", "name"), _said(method, "method", "title")
    if _said(method, "method", "_target_") is None:
        extra = set(method) - {"name", "title", "_target_"}
        if extra:
            raise InputError(f"method.{sorted(extra)[0]} is not a setting of method={name}, which keeps every token")
        scorer = None
    else:
        scorer = target(method, "method", "name", "title")
    documents = target(cfg["document"], "document", "name")
    documents.check()
    _fits(scorer, documents)
    phases = {key: target(node, f"phase.{key}") for key, node in cfg.get("phase", {}).items()}
    if not phases:
        raise InputError("phase=[] measures nothing: choose among memory, perturbation, perplexity, or phase=all")
    for key, phase in phases.items():
        if phase.needs > documents.continuation:
            raise InputError(
                f"phase.{key} needs {phase.needs} tokens after the prompt "
                f"but document.continuation={documents.continuation}: raise the latter"
            )
    backend = typed(MLXConfig if _said(backend, "backend", "_target_") == MLX else BackendConfig, backend, "backend")
    if importlib.util.find_spec(backend._target_.partition(".")[0] or "-") is None:
        raise InputError(f"backend._target_={backend._target_} can't be found: write the full path of a class")
    general = typed(GeneralConfig, {f.name: cfg.get(f.name) for f in fields(GeneralConfig)}, "")
    refit = cfg["refit"]
    return Settings(
        method=MethodConfig(name, title, scorer),
        model=_model(cfg["model"]),
        budget=None if scorer is None else typed(BudgetConfig, cfg["budget"], "budget"),
        storage=target(storage, "storage", "name"),
        storage_name=_said(storage, "storage", "name"),
        refit=None if _said(refit, "refit", "_target_") is None else target(refit, "refit", "name"),
        backend=backend,
        documents=documents,
        phases=phases,
        tracking=typed(TrackingConfig, cfg["tracking"], "tracking"),
        outputs=Path(general.outputs).resolve(),
        checkpoints=Path(general.checkpoints).expanduser().resolve(),
        seed=general.seed,
        force=general.force,
        prefill_memory_gb=general.prefill_memory_gb,
        prefill_cache_gb=general.prefill_cache_gb,
        prefill_cache_least_s=general.prefill_cache_least_s,
    )
