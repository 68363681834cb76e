"""The command line: Hydra composes, one function runs, every refusal is a sentence."""

import os
import re
import shlex
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

from pipeline.settings.compose import composed, outermost, spelled_out, sweep
from pipeline.settings.errors import DiskFull, Exhausted, InputError, Terminated, exhausted, suggestion
from pipeline.settings.folders import conf_dir, register_resolvers

PLUGINS = {"joblib": "launchers", "submitit_slurm": "launchers", "submitit_local": "launchers", "ray": "ray"}
SHOW_TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"

register_resolvers()


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")
def _run(cfg: DictConfig) -> float | None:
    try:
        return _measure(cfg) if cfg.grid is None else _measure_grid(cfg.grid)
    except DiskFull as error:  # no other job could write anything either
        _say(error)
        sys.exit(1)
    except (InputError, Exhausted) as error:
        if SHOW_TRACEBACKS:
            raise
        _say(error)
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(_status(error))
        raise  # in a sweep the other jobs go on; Hydra raises the first error again when all are through
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _say(error)
        raise


def _say(error: Exception) -> None:
    """One sentence, once."""
    if not getattr(error, "said", False):
        text = str(error) if isinstance(error, InputError | Exhausted) else _first_line(error)
        print(f"pipeline: {text}", file=sys.stderr)
        error.said = True


def _first_line(error: Exception) -> str:
    note = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"the run failed, {type(error).__name__}: {str(error).strip().split(chr(10))[0]}{note}"


def _status(error: Exception) -> int:
    """Exit status: 2 for input that can't be used, 1 for a run that failed."""
    return 2 if isinstance(error, InputError) else 1


def _measure(cfg: DictConfig) -> float | None:
    from pipeline.job import prepare

    job = prepare(cfg)  # refuses bad input before anything heavy is imported
    from pipeline.run import execute
    from pipeline.show.summary import show

    result = execute(job)
    show(result)
    return result.metrics.get("ppl/delta_nll")


def _measure_grid(grid: str) -> None:
    """Sweep the settings in `grid` within this job; a failure does not stop the others."""
    outer = [o for o in HydraConfig.get().overrides.task if not o.startswith("grid=")]
    failures = []
    for overrides in sweep(None, [*outer, *shlex.split(grid)]):
        try:
            _measure(composed(overrides))
        except DiskFull:
            raise
        except Exception as error:
            _say(error)
            failures.append(error)
    if failures:
        raise failures[0]


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
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher" and option in PLUGINS:
            return f"the {option} launcher is not installed: pip install 'spectral-kv[{PLUGINS[option]}]'"
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
    """Turn errors that are for the user into one sentence.

    Exit status 2 for input that can't be used, 1 where the disk or the memory did not suffice, 130 for Ctrl-C and 143
    for SIGTERM. `HYDRA_FULL_ERROR=1` shows tracebacks instead. Anything else is a defect or a failed run and keeps its
    traceback.
    """
    if SHOW_TRACEBACKS:
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra would print its own rendering and exit; with this it hands exceptions over
    )
    outputs = Path(next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("outputs=")), "outputs"))
    try:
        yield
    except (InputError, Exhausted) as error:
        _say(error)
        sys.exit(_status(error))
    except (HydraException, OmegaConfBaseException) as error:
        print(f"pipeline: {sentence(error, overrides)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (reason := exhausted(error, outputs)) is not None:
            _say(reason)
            sys.exit(1)
        if error.filename is None or not Path(error.filename).absolute().is_relative_to(outputs.absolute()):
            raise
        print(
            f"pipeline: outputs={outputs} can't be written to ({error.strerror}): set outputs=<a folder of yours>",
            file=sys.stderr,
        )
        sys.exit(2)
    except Terminated:
        print("pipeline: terminated; finished runs are kept", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("pipeline: interrupted; finished runs are kept", file=sys.stderr)
        sys.exit(130)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def main() -> None:
    """Entry point of `python -m pipeline`."""
    sys.argv[1:] = outermost(spelled_out(sys.argv[1:]))
    with reporting(sys.argv[1:]):
        _run()
