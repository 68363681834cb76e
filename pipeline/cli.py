"""The command line: Hydra composes, one function runs, every refusal is a sentence."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.compose import spelled_out
from pipeline.config import conf_dir, register_resolvers, suggestion
from pipeline.errors import InputError

SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"

register_resolvers()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _run(cfg: DictConfig) -> float | None:
    try:
        return _measure(cfg)
    except InputError as error:
        if SHOW_TRACEBACKS:
            raise
        print(f"pipeline: {error}", file=sys.stderr)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(2)
        error.said = True
        raise  # in a sweep the other jobs go on; Hydra raises the first error again when all are through


def _measure(cfg: DictConfig) -> float | None:
    from pipeline.job import prepare

    job = prepare(cfg)  # refuses bad input before anything heavy is imported
    from pipeline.run import execute
    from pipeline.summary import show

    result = execute(job)
    show(result)
    return result.metrics.get("ppl/delta_nll")


def _known_keys(overrides: list[str]) -> list[str]:
    """Settings that exist with the chosen options, for a suggestion."""
    groups = {name for name in os.listdir(conf_dir()) if "." not in name}
    chosen = [o for o in overrides if o.split("=")[0] in groups and "," not in o]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = hydra.compose("config", overrides=chosen)

    def walk(node: DictConfig, prefix: str) -> list[str]:
        keys = []
        for key in node:
            child = node._get_node(key)
            keys += walk(child, f"{prefix}{key}.") if isinstance(child, DictConfig) else [f"{prefix}{key}"]
        return keys

    return walk(cfg, "")


def sentence(error: Exception, overrides: list[str]) -> str:
    """What is wrong and what to write instead, for errors of composition."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).partition("/")
        return f"{group}={option} is not known{suggestion(option, list(error.options or []))}"
    if isinstance(error, OverrideParseException):
        remedy = "write group=option or setting=value, and quote it if the shell could change it"
        return f"{error.override} can't be read: {remedy}"
    text = str(error)
    if found := re.search(r"Could not (?:override|append to config) '?([\w.@/]+)", text):
        key = found.group(1)
        nearest = suggestion(key, _known_keys(overrides)).split(": choose")[0]
        return f"{key} is not a setting{nearest} (python -m pipeline --cfg job prints all settings)"
    return " ".join(text.split("\n")[0].split())


@contextmanager
def reporting(overrides: list[str]) -> Iterator[None]:
    """Turn errors that are for the user into one sentence: exit status 2 for input that can't be used, 130 for Ctrl-C.

    `HYDRA_FULL_ERROR=1` shows tracebacks instead. Anything else is a defect or a failed run and keeps its traceback.
    """
    if SHOW_TRACEBACKS:
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra would print its own rendering and exit; with this it hands exceptions over
    )
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as error:
        if not getattr(error, "said", False):
            message = str(error) if isinstance(error, InputError) else sentence(error, overrides)
            print(f"pipeline: {message}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        outputs = Path(next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("outputs=")), "outputs"))
        if error.filename is None or not Path(error.filename).absolute().is_relative_to(outputs.absolute()):
            raise
        print(
            f"pipeline: outputs={outputs} can't be written to ({error.strerror}): set outputs=<a folder of yours>",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("pipeline: interrupted; finished runs are kept", file=sys.stderr)
        sys.exit(130)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def main() -> None:
    """Entry point of `python -m pipeline`."""
    sys.argv[1:] = spelled_out(sys.argv[1:])
    with reporting(sys.argv[1:]):
        _run()
