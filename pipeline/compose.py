"""How overrides are written, and composing configurations without `python -m pipeline`."""

import re
from itertools import product

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from pipeline.config import conf_dir, register_resolvers


def spelled_out(overrides: list[str]) -> list[str]:
    """Overrides with `budget=256,512` written as `budget.tokens=256,512`: Hydra has no options named by numbers."""
    return [re.sub(r"^budget=(?=\d|range\(|choice\()", "budget.tokens=", o) for o in overrides]


def composed(overrides: list[str]) -> DictConfig:
    """The configuration that `python -m pipeline <overrides>` would run."""
    register_resolvers()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=spelled_out(overrides))


def sweep(experiment: str | None, overrides: list[str]) -> list[list[str]]:
    """Override lists of a sweep `experiment=<name> <overrides>`: the product over commas, the first key outermost."""
    register_resolvers()
    preset = [] if experiment is None else [f"experiment={experiment}"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("config", overrides=preset, return_hydra_config=True)
    params = {key: str(value) for key, value in (cfg.hydra.sweeper.params or {}).items()}
    for override in spelled_out(overrides):
        key, _, value = override.partition("=")
        params[key] = value
    parser = OverridesParser.create()
    choices = []
    for override in parser.parse_overrides([f"{key}={value}" for key, value in params.items()]):
        name = override.get_key_element()
        values = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        choices.append([f"{name}={value}" for value in values])
    return [[*preset, *job] for job in product(*choices)]
