"""How overrides are written, and composing configurations without `python -m pipeline`."""

import re
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.settings.errors import InputError
from pipeline.settings.folders import conf_dir, register_resolvers

COSTLY = ("model", "backend", "document")  # a change of model loads one, a change of document prefills


def spelled_out(overrides: list[str]) -> list[str]:
    """Overrides with `budget=256,512` written as `budget.tokens=256,512`: Hydra has no options named by numbers."""
    return [re.sub(r"^budget=(?=\d|\[|range\(|choice\()", "budget.tokens=", o) for o in overrides]


def outermost(overrides: list[str]) -> list[str]:
    """Command-line arguments with the settings that cost most to change first: a sweep goes through the first slowest.

    Options (`-m`, `--cfg job`) stay where they are, and so does the order of all other settings.
    """
    places = [i for i, word in enumerate(overrides) if "=" in word and not word.startswith("-")]

    def rank(override: str) -> int:
        group = re.split(r"[.=@]", override.lstrip("+~"), maxsplit=1)[0]
        return COSTLY.index(group) if group in COSTLY else len(COSTLY)

    ordered = list(overrides)
    for place, override in zip(places, sorted((overrides[i] for i in places), key=rank), strict=True):
        ordered[place] = override
    return ordered


def _configuration() -> AbstractContextManager:
    """Where options are found: by the search path of the application that runs, or else in the project's own folder."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_dir(conf_dir(), version_base="1.3")


def refuse_contradictions(overrides: list[str]) -> None:
    """Refuse a variant together with a method that it is no variant of, and outputs without a name.

    Raises
    ------
    InputError
    """
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    if given.get("outputs", "outputs").strip("'\" ") in ("", "null"):
        raise InputError("outputs is empty: set outputs=<a folder>")
    file = Path(conf_dir()) / "variant" / f"{given.get('variant')}.yaml"
    if "method" in given and file.is_file():
        defaults = OmegaConf.load(file).get("defaults", [])
        own = next((entry["override /method"] for entry in defaults if "override /method" in entry), None)
        if own not in (None, given["method"]):
            raise InputError(
                f"variant={given['variant']} is one of method={own} and can't go with method={given['method']}: "
                "leave out one of the two"
            )


def _values(override, words: str) -> list[str]:
    """What an override sweeps over, or its one value."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    values = list(override.sweep_string_iterator())
    if not values:
        raise InputError(f"{words} stands for nothing: check the names or the range, or write the values with commas")
    return values


def refuse_empty(overrides: list[str]) -> None:
    """Refuse a sweep over nothing, which Hydra would finish at once without a word.

    Raises
    ------
    InputError
    """
    swept = [o for o in overrides if "=glob(" in o or "=range(" in o]
    if not swept or any(o.startswith("hydra.searchpath") for o in overrides):
        return
    with _configuration():
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        for words, override in zip(swept, parser.parse_overrides(swept), strict=True):
            _values(override, words)


@cache
def _of_options(conf: str, options: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(conf, version_base="1.3"):
        return compose("config", overrides=list(options))


def _is_value(override: Override) -> bool:
    """Whether an override gives a setting a value, and does not choose an option of a group."""
    key = override.key_or_group
    return "." in key or not (Path(conf_dir()) / key).is_dir()


def _by_value(overrides: list[str]) -> DictConfig | None:
    """What Hydra composes, by giving values to what it composed before of the same options.

    Hydra reads and merges some thirty files for a configuration, which takes a quarter of a second; values come last
    there, too. None where overrides do more than that, or can't be followed: Hydra has the words for it.
    """
    if GlobalHydra.instance().is_initialized():  # of an application, which may look for options elsewhere
        return None
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [override for override in parsed if _is_value(override)]
    plain = [v for v in values if v.type == OverrideType.CHANGE and not v.package]
    if len(plain) < len(values) or any(v.is_hydra_override() or v.is_sweep_override() for v in values):
        return None
    cfg = deepcopy(_of_options(conf_dir(), tuple(o.input_line for o in parsed if not _is_value(o))))
    try:
        for value in values:
            OmegaConf.update(cfg, value.key_or_group, value.value(), merge=True)
    except OmegaConfBaseException:
        return None
    return cfg


def composed(overrides: list[str]) -> DictConfig:
    """The configuration that `python -m pipeline <overrides>` would run.

    A preset names the table that the run is for, as Hydra's own record of choices does there.
    """
    register_resolvers()
    refuse_contradictions(overrides)
    words = spelled_out(overrides)
    cfg = _by_value(words)
    if cfg is None:
        with _configuration():
            cfg = compose("config", overrides=words)
    for override in overrides:
        if override.startswith("experiment=") and cfg.tracking.table is None:
            cfg.tracking.table = override.removeprefix("experiment=")
    return cfg


@cache
def _swept(conf: str, preset: tuple[str, ...]) -> dict[str, str | None]:
    """What a preset sweeps over.

    The model's place among the settings is kept by a reference to the option chosen anyway, which need not be said.
    """
    with _configuration():
        params = compose("config", overrides=list(preset), return_hydra_config=True).hydra.sweeper.params
    return {key: None if OmegaConf.is_interpolation(params, key) else str(params[key]) for key in params}


def sweep(experiment: str | None, overrides: list[str]) -> list[list[str]]:
    """Override lists of a sweep `experiment=<name> <overrides>`: the product over commas.

    The model is the outermost loop, whatever the order of the overrides, as in a sweep of `python -m pipeline`.
    """
    register_resolvers()
    preset = [] if experiment is None else [f"experiment={experiment}"]
    params = dict(_swept(conf_dir(), tuple(preset)))
    for override in outermost(spelled_out(overrides)):
        key, given, value = override.partition("=")
        params[key] = value if value or not given else "''"
    words = [f"{key}={value}" if value else key for key, value in params.items() if value is not None]
    choices = []
    with _configuration():
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        for word, override in zip(words, parser.parse_overrides(words), strict=True):
            name = override.get_key_element()
            if override.is_delete():
                choices.append([word])
                continue
            choices.append([f"{name}={value}" for value in _values(override, word)])
    return [[*preset, *job] for job in product(*choices)]
