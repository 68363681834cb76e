"""Measure a finished run again from the configuration that it stored, and say what differs.

    python -m pipeline.rerun 3f0c9a41                      a run by its id, or by how the id begins
    python -m pipeline.rerun 3f0c9a41 outputs=/data        of the store of another outputs folder
    python -m pipeline.rerun 3f0c9a41 model.path=/models/x with a path that is another one on this machine

The second run is recorded beside the first, with the tag `rerun` naming it. Times are not compared. Exit status 0: all
other metrics are equal in every digit; 1: some are not, and what else is not alike (versions, hardware, settings, the
hashes of code, model and documents) is printed with them; 2: the run can't be repeated.
"""

import argparse
import sys
from dataclasses import dataclass

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.job import prepare
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed, spelled_out
from pipeline.settings.errors import InputError
from pipeline.store import search
from pipeline.store.record import marked
from pipeline.store.tracking import CONFIGURATION

TIMED = ("time/", "prefill/", "throughput/", "system/")  # what the clock and the caches of a machine decide
TIMED_ENDS = ("tok_s", "peak_mb")
ADDED = ("_vs_", "_gap")  # metrics that `python -m pipeline.compare` gave to a run afterwards
ALIKE = ("git.revision", "git.changed", "hardware", "platform", "threads")
ALIKE_BEGINS = ("hash.", "version.")
DECIDING = ("method", "model", "document", "phase", "storage", "backend", "seed")  # no default may stand in for these


@dataclass(frozen=True)
class Repetition:
    """Two runs of one configuration beside each other.

    Parameters
    ----------
    equal : list of str
        Metrics that are the same number.
    differing : dict of str to (first, second)
        Those that are not; None where a run does not have it.
    timed : list of str
        Metrics that are not compared.
    unlike : dict of str to (first, second)
        Versions, hashes, hardware and settings that differ.
    """

    equal: list[str]
    differing: dict[str, tuple[float | None, float | None]]
    timed: list[str]
    unlike: dict[str, tuple[str | None, str | None]]


def beside(first, second) -> Repetition:
    """Compare two runs of MLflow."""
    ours, theirs = second.data.metrics, first.data.metrics
    names = sorted(name for name in {*ours, *theirs} if not any(part in name for part in ADDED))
    timed = [name for name in names if name.startswith(TIMED) or name.endswith(TIMED_ENDS)]
    values = {name: (theirs.get(name), ours.get(name)) for name in names if name not in timed}
    tags = sorted(t for t in {*first.data.tags, *second.data.tags} if t in ALIKE or t.startswith(ALIKE_BEGINS))
    about = {tag: (first.data.tags.get(tag), second.data.tags.get(tag)) for tag in tags}
    before, after = first.data.params, second.data.params
    about |= {key: (before.get(key), after.get(key)) for key in sorted({*before, *after})}
    return Repetition(
        [name for name, (a, b) in values.items() if a == b],
        {name: pair for name, pair in values.items() if pair[0] != pair[1]},
        timed,
        {tag: pair for tag, pair in about.items() if pair[0] != pair[1]},
    )


def _found(mlflow, begins: str):
    """The finished run whose id begins so."""
    found = [run for run in search.finished(mlflow) if run.info.run_id.startswith(begins)]
    if not found:
        raise InputError(
            f"no finished run has an id that begins with {begins}: python -m pipeline.compare --runs lists"
        )
    if len(found) > 1:
        raise InputError(f"{len(found)} finished runs have ids that begin with {begins}: write more of the id")
    return found[0]


def _stored(mlflow, first, general: list[str]) -> DictConfig:
    """The configuration of a run, with the defaults of groups and settings that it was too early to have."""
    run_id = first.info.run_id
    try:
        text = mlflow.artifacts.load_text(f"{first.info.artifact_uri}/config.yaml")
    except (mlflow.MlflowException, OSError):
        raise InputError(f"run {run_id} has lost its config.yaml: measure with python -m pipeline") from None
    try:
        stored = yaml.safe_load(text)
    except yaml.YAMLError:
        stored = None
    if not isinstance(stored, dict) or not set(DECIDING) <= set(stored):
        raise InputError(f"the config.yaml of run {run_id} is damaged: measure with python -m pipeline")
    defaults = composed(general)
    OmegaConf.set_struct(defaults, False)  # a project may have settings of its own
    for key in stored.keys() - {"tracking"}:
        defaults[key] = stored[key]  # whole: other options of a group have other settings
    defaults.tracking = {**defaults.tracking, **stored.get("tracking", {})}
    return defaults


def _change(cfg: DictConfig, override: str, run_id: str) -> None:
    """Give a setting of a stored configuration another value, written as for `python -m pipeline`."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:
        raise InputError(f"{override} can't be read: write setting=value") from None
    key, plain = parsed.key_or_group, parsed.type == OverrideType.CHANGE
    before = OmegaConf.select(cfg, key, default=search) if plain else search
    if before is search:
        raise InputError(f"{override} is no setting of run {run_id}: write one of its config.yaml")
    if parsed.is_sweep_override():
        raise InputError(f"{override} has several values: a run is measured again with one")
    if isinstance(before, DictConfig):
        raise InputError(
            f"{override} chooses another option than run {run_id} has: change single settings of it, as "
            f"{key}.{next(iter(before), 'x')}=..., or measure with python -m pipeline {override}"
        )
    try:
        OmegaConf.update(cfg, key, parsed.value())
    except OmegaConfBaseException as error:
        raise InputError(f"{override} can't be used ({str(error).splitlines()[0]}): write another value") from None


def repeated(begins: str, overrides: list[str]) -> tuple[object, object]:
    """Measure a run again; both as MLflow holds them.

    Raises
    ------
    InputError
        If there is no such run, or its configuration means nothing here.
    """
    overrides = spelled_out(overrides)
    general = search.stores(overrides)
    mlflow, settings, outputs = search.opened(general)
    first = _found(mlflow, begins)
    cfg = _stored(mlflow, first, general)
    cfg.outputs, cfg.force, cfg.prefill_cache_gb = str(outputs), True, 0  # prompts are run again, too
    cfg.tracking.uri, cfg.tracking.experiment = settings.uri, settings.experiment
    for override in (o for o in overrides if o not in general):
        _change(cfg, override, first.info.run_id)
    job = prepare(cfg)
    from pipeline.run import execute, identity

    marks = {"rerun": first.info.run_id}
    if identity(job) == first.data.tags.get(CONFIGURATION):  # the newer one stands for both from now on
        marks |= {tag: first.data.tags[tag] for tag in ("table", "sweep") if tag in first.data.tags}
    with marked(marks):
        result = execute(job)
    return first, mlflow.MlflowClient().get_run(result.run_id)


def said(first, second, found: Repetition) -> str:
    """What a person wants to know of a repetition."""
    title = first.data.tags.get("title", first.info.run_name)
    lines = [f"{title}, run {first.info.run_id}, measured again as run {second.info.run_id}"]
    lines += [f"  {tag}: {a} -> {b}" for tag, (a, b) in found.unlike.items()]
    lines += [f"  {name}: {a} -> {b}" for name, (a, b) in found.differing.items()]
    count = "all" if not found.differing else str(len(found.equal))
    total = len(found.equal) + len(found.differing)
    lines.append(
        f"{count} of {total} metrics are equal in every digit; {len(found.timed)} that tell times are not compared"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.rerun", usage="%(prog)s [-h] RUN [SETTING ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("words", nargs="+", metavar="RUN SETTING", help="id of a run, or its first letters; settings")
    words = parser.parse_intermixed_args().words
    overrides = [word for word in words if "=" in word]
    with reporting(overrides):
        begins = [word for word in words if "=" not in word]
        if len(begins) != 1:
            raise InputError(f"{len(begins)} ids of runs are given: write one, and settings as setting=value")
        first, second = repeated(*begins, overrides)
        found = beside(first, second)
        print(said(first, second, found))
        sys.exit(1 if found.differing else 0)


if __name__ == "__main__":
    main()
