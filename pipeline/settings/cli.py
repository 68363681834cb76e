"""The command line: Hydra composes, one function runs, every refusal is a sentence."""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from pipeline.settings import gpus
from pipeline.settings.compose import composed, outermost, refuse_contradictions, refuse_empty, spelled_out, sweep
from pipeline.settings.errors import DiskFull, Exhausted, InputError, Terminated, exhausted, suggestion, terminate
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
        # Hydra would add a line of its own to what `reporting` says
        words = unwritable(error, Path(cfg.outputs), sys.argv[1:]) if isinstance(error, OSError) else None
        if words is not None and HydraConfig.get().mode == RunMode.RUN and not SHOW_TRACEBACKS:
            print(f"pipeline: {words}", file=sys.stderr)
            sys.exit(2)
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
    from pipeline.store.tracking import refuse_unusable

    _from_the_start(cfg)
    if HydraConfig.initialized() and HydraConfig.get().runtime.choices.get("hydra/launcher") == gpus.LAUNCHER:
        gpus.take(Path(cfg.outputs).resolve())
    job = prepare(cfg)  # refuses bad input before anything heavy is imported,
    refuse_unusable(job.settings.tracking, job.settings.outputs)  # and so does this
    from pipeline.run import execute
    from pipeline.show.summary import show

    result = execute(job)
    show(result)
    return result.metrics.get("ppl/delta_nll")


PATHS = (
    "outputs", "checkpoints", "model.path", "model.calibration", "model.bases", "model.kvzap", "storage.bases",
    "method.weights", "document.path",
)  # fmt: skip


def _from_the_start(cfg: DictConfig) -> None:
    """Where Hydra changes into the folder of a job, paths still count from the folder that the command was given in."""
    if not HydraConfig.initialized() or not HydraConfig.get().job.chdir:
        return
    start = Path(HydraConfig.get().runtime.cwd)
    for key in PATHS:
        if isinstance(path := OmegaConf.select(cfg, key), str) and path:
            OmegaConf.update(cfg, key, str(start / Path(path).expanduser()))
    uri = cfg.tracking.uri
    if uri and uri.startswith("sqlite:///"):
        cfg.tracking.uri = f"sqlite:///{start / uri.removeprefix('sqlite:///')}"


def _measure_grid(grid: str) -> None:
    """Sweep the settings in `grid` within this job; a failure does not stop the others."""
    try:
        words = shlex.split(grid) if isinstance(grid, str) else []
    except ValueError:
        words = []
    if not words:
        raise InputError(f"grid={grid} can't be read: write settings in quotes, as grid='\"method=tri,snapkv\"'")
    outer = [o for o in HydraConfig.get().overrides.task if not o.startswith("grid=")]
    failures = []
    for overrides in sweep(None, [*outer, *words]):
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
        keys = [] if prefix else sorted(groups)
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
        there = list(error.options or []) or [path.stem for path in (Path(conf_dir()) / group).glob("*.yaml")]
        return f"{group}={option} is not known{suggestion(option, there)}"
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        if not value.isascii():
            return f"{error.override} can't be read: letters beyond ASCII need quotes, write '{key}=\"{value}\"'"
        remedy = "write group=option or setting=value, and quote it if the shell could change it"
        return f"{error.override} can't be read: {remedy}"
    text = str(error)
    if found := re.search(r"Could not (?:override|append to config) '?([\w.@/]+)", text):
        key = found.group(1)
        phase = key.split(".")[1] if key.startswith("phase.") else ""
        if (Path(conf_dir()) / "phase" / f"{phase}.yaml").is_file():
            return f"{key} belongs to a phase that was not chosen: add {phase} to phase=[...], or leave the setting out"
        nearest = suggestion(key, _known_keys(overrides)).split(": choose")[0]
        return f"{key} is not a setting{nearest} (python -m pipeline --cfg job prints all settings)"
    if found := re.search(r"Ambiguous value for argument '([^']*)'", text):
        return f"{found[1]} has several values: add -m to sweep over them, or give one"
    if found := re.search(r"Could not delete (?:from config\. )?'?~?([\w.@/]+)", text):
        return f"~{found[1]} takes nothing away, there is no such entry: leave it out, or write {found[1]}=null"
    if found := re.search(r"([\w.@/]+) appears more than once in the final defaults list", text):
        return f"{found[1].replace('/', '=')} is given twice: name it once"
    return " ".join(text.split("\n")[0].split())


def unwritable(error: OSError, outputs: Path, overrides: list[str]) -> str | None:
    """What is wrong with the folder that a run wanted to write to, if that is what an error is about."""
    if error.filename is None:
        return None
    path = Path(error.filename).absolute()
    where = next((o for o in overrides if o.startswith(("hydra.run.dir=", "hydra.sweep.dir="))), "")
    folder = where.partition("=")[2].split("$")[0]
    if folder and path.is_relative_to(Path(folder).absolute()):
        return f"{where} can't be written to ({error.strerror}): choose a folder of yours"
    if not path.is_relative_to(outputs.absolute()):
        return None
    file = next((p for p in (path, *path.parents) if p.is_file()), None)
    if file is not None and file != outputs.absolute():
        return f"{file} is a file where a folder is needed: move it away, or set outputs=<another folder>"
    return f"outputs={outputs} can't be written to ({error.strerror}): set outputs=<a folder of yours>"


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
        if (words := unwritable(error, outputs, overrides)) is None:
            raise
        print(f"pipeline: {words}", file=sys.stderr)
        sys.exit(2)
    except Terminated:
        print("pipeline: terminated; finished runs are kept", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("pipeline: interrupted; finished runs are kept", file=sys.stderr)
        sys.exit(130)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


class Begun(Callback):
    """Remembers the sweep that this process launches, so that the run above its runs can be ended as it ends.

    Every job is told which process that is, wherever a launcher has it run: the sweep lasts as long.
    """

    config: ClassVar[DictConfig | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        from pipeline.store import sweeps

        Begun.config = config
        with read_write(config.hydra.overrides):
            config.hydra.overrides.hydra.append(sweeps.launched())  # each job composes its configuration from these


@contextmanager
def closed() -> Iterator[None]:
    """End the run above a sweep as the sweep itself ends; SIGTERM ends it also between two jobs, and its processes."""
    Begun.config = None
    status = "FINISHED"
    listens = threading.current_thread() is threading.main_thread()  # no other thread gets signals
    before = signal.signal(signal.SIGTERM, terminate) if listens else None
    try:
        yield
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        if listens:
            signal.signal(signal.SIGTERM, before)
        if Begun.config is not None:
            from pipeline.store import sweeps

            with suppress(Exception):  # on a full disk, for one: how the jobs ended matters more
                sweeps.close(Begun.config, status)


def main() -> None:
    """Entry point of `python -m pipeline`."""
    sys.argv[1:] = outermost(spelled_out(sys.argv[1:]))
    with reporting(sys.argv[1:]):
        refuse_contradictions(sys.argv[1:])
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            refuse_empty(sys.argv[1:])
        if f"hydra/launcher={gpus.LAUNCHER}" in sys.argv and {"-m", "--multirun"} & set(sys.argv):
            gpus.offer()
        if "hydra.launcher.n_jobs=0" in sys.argv:
            raise InputError("hydra.launcher.n_jobs=0 starts no process: give 1 or more, or -1 for every core")
        with closed():
            _run()
