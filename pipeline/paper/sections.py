"""What has to be measured: the configurations of every section, composed once and remembered."""

import hashlib
import json
import multiprocessing
import shlex
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.documents.base import TooFewWindows
from pipeline.job import Job, prepare
from pipeline.paper.follow import follow, outliving
from pipeline.settings.compose import composed, spelled_out, sweep
from pipeline.settings.errors import InputError
from pipeline.settings.folders import PACKAGE, conf_dir, register_resolvers

FEWEST = 16  # windows on which a section stands for one of more, where a text holds no more


@cache
def _written() -> dict[str, dict]:
    return yaml.safe_load(files("pipeline.paper").joinpath("sections.yaml").read_text(encoding="utf-8"))


def titles() -> dict[str, str]:
    """Titles of the sections there are, by their experiment, in the order of the document."""
    return {experiment: about["title"] for experiment, about in _written().items()}


def _model(overrides: list[str]) -> DictConfig:
    """A configuration with the model that overrides choose."""
    return composed([o for o in overrides if o.startswith(("model=", "model.", "+model."))])


def usual(full: bool, overrides: list[str] = (), models: list[str] | None = None) -> list[str]:
    """Sections that are written where none are named: those apart belong to the whole document alone.

    One that needs what a chosen model has not got, as the bases of a codec, is left out.
    """
    found = [experiment for experiment, about in _written().items() if full or not about.get("apart")]
    if not any("needs" in _written()[experiment] for experiment in found):
        return found
    chosen = [composed([f"model={model}"]) for model in models] if models else [_model(overrides)]

    def there(experiment: str) -> bool:
        key = _written()[experiment].get("needs")
        return key is None or all(OmegaConf.select(cfg, key) is not None for cfg in chosen)

    return [experiment for experiment in found if there(experiment)]


def brief(experiment: str, overrides: list[str]) -> list[str]:
    """What of an experiment the document measures unless all is asked for, where the overrides don't say it."""
    given = {o.partition("=")[0] for o in spelled_out(overrides)}
    return [o for o in _written()[experiment].get("brief", []) if o.partition("=")[0] not in given]


def spared(experiment: str, overrides: list[str]) -> list[str]:
    """What of an experiment is measured on a model that has not got all it reads, where the overrides don't say it."""
    given = {o.partition("=")[0] for o in spelled_out(overrides)}
    lacking = _written()[experiment].get("lacking", {})
    cfg = _model(overrides) if lacking else None
    own = [o for key, narrowed in lacking.items() if OmegaConf.select(cfg, key) is None for o in narrowed]
    return [o for o in own if o.partition("=")[0] not in given]


@dataclass(frozen=True)
class Section:
    """A section's jobs.

    Parameters
    ----------
    experiment : str
    asked : int
        Documents that the document asks for.
    narrowed : list of str
        Settings by which it is less than the whole experiment.
    choices : list of dict of str to str
        What the experiment varies, for every job.
    jobs : list of Job
    taken : list of str
        Overrides of the whole document that mean something to the section.
    """

    experiment: str
    asked: int
    narrowed: list[str]
    choices: list[dict[str, str]]
    jobs: list[Job]
    taken: list[str]

    @property
    def title(self) -> str:
        return titles()[self.experiment]


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        child = node._get_node(key)
        yield f"{prefix}{key}"
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{prefix}{key}.")


def _preset(experiment: str) -> dict:
    return yaml.safe_load((Path(conf_dir()) / "experiment" / f"{experiment}.yaml").read_text())


def _chosen_groups(experiment: str) -> set[str]:
    """Groups whose option the experiment itself chooses: they are what it is about."""
    entries = (key for entry in _preset(experiment).get("defaults", []) for key in entry)
    return {key.removeprefix("override /") for key in entries if key.startswith("override /")}


def applicable(experiment: str, overrides: list[str]) -> list[str]:
    """The overrides that mean something to an experiment.

    An experiment that chooses the option of a group itself, as `synthetic` does with the model, keeps its choice; and
    settings that its options do not have, as `model.path` there, are for other experiments. What is added to an option,
    as `+model.bases`, is for all that don't choose it themselves.
    """
    own = _chosen_groups(experiment)
    spelled = spelled_out(overrides)
    groups = [o for o in spelled if "." not in (key := o.partition("=")[0]) and key not in own]
    known = set(_keys(composed([f"experiment={experiment}", *(o for o in groups if "," not in o)])))

    def meant(override: str) -> bool:
        key = override.partition("=")[0]
        added = key.startswith("+") and key[1:].partition(".")[0] not in own
        return override in groups or ("." in key and (key in known or added))

    return [o for o in spelled if meant(o)]


def _inside(job: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """The jobs of a job's grid, each with the keys that the grid sets; or the job itself."""
    grid = next((o.partition("=")[2] for o in job if o.startswith("grid=")), None)
    if grid is None:
        yield job, []
        return
    words = shlex.split(grid.strip("\"'"))
    for inner in sweep(None, [*(o for o in job if not o.startswith("grid=")), *words]):
        yield inner, [word.partition("=")[0] for word in words]


def _written_out(cfg: DictConfig) -> tuple[dict, bool]:
    """A configuration as JSON can hold it, and whether its references are resolved in it.

    Those to the environment are looked up anew each time; for those that lead nowhere `prepare` has the words.
    """
    written = OmegaConf.to_container(cfg, resolve=False)
    if "${oc.env:" in json.dumps(written):
        return written, False
    try:
        return OmegaConf.to_container(cfg, resolve=True), True
    except OmegaConfBaseException:
        return written, False


def _composed(experiment: str, overrides: list[str], narrowed: list[str]) -> dict:
    """What JSON can hold of a section: the documents that its experiment asks for, the overrides that it takes, and
    what the experiment varies and the configuration of every job.
    """
    taken = applicable(experiment, overrides)
    varied = [key for key in _preset(experiment)["hydra"]["sweeper"]["params"] if key != "grid"]
    jobs = []
    for outer in sweep(experiment, [f"tracking.table={experiment}", *narrowed, *taken]):
        for job, inner in _inside(outer):
            choice = {key: value for key, value in (o.split("=", 1) for o in job) if key in (*varied, *inner)}
            config, resolved = _written_out(composed(job))
            jobs.append({"choice": choice, "config": config, "resolved": resolved})
    counted = [o for o in narrowed if o.startswith("document.count=")]
    asked = int(composed([f"experiment={experiment}", *counted]).document.count)
    return {"asked": asked, "taken": taken, "narrowed": narrowed, "jobs": jobs}


def _each_composed(asked: list[tuple[str, list[str], list[str]]], processes: int) -> list[dict]:
    """`_composed` of several sections, by several processes where that is more than one."""
    if min(processes, len(asked)) < 2:
        return [_composed(*one) for one in asked]
    # Hydra keeps state of the process, and frameworks may have started threads: nothing is forked
    context = multiprocessing.get_context("spawn")
    with outliving(processes), ProcessPoolExecutor(min(processes, len(asked)), context, follow) as pool:
        return list(pool.map(_composed, *zip(*asked, strict=True)))


def _conf_hash() -> str:
    """Hash of all that decides what overrides are composed to."""
    digest = hashlib.sha256(f"{version('hydra-core')} {version('omegaconf')} {PACKAGE}".encode())
    for path in sorted(Path(conf_dir()).rglob("*.yaml")):
        digest.update(str(path).encode() + path.read_bytes())
    for path in (Path(__file__), Path(__file__).parent / "sections.yaml", PACKAGE / "settings" / "compose.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def plan(
    experiments: list[str], overrides: list[str], memory: Path, full: bool = False, processes: int = 1
) -> list[Section]:
    """The jobs of the sections, each checked; of whole experiments if `full`.

    Hydra takes 80 ms and more to compose a job, so that `processes` share the sections, and what was composed is
    remembered in the file `memory`, as long as no configuration file changes.

    Of a text that the model's tokenizer cuts into fewer windows than an experiment asks for the section takes them all,
    if there are `FEWEST` and no override says how many.

    Raises
    ------
    InputError
        If there is no such section, or an override means nothing to any of them.
    """
    for name in experiments:
        if name not in titles():
            raise InputError(f"--sections has '{name}', which is not known: choose among {', '.join(titles())}")
    register_resolvers()
    key = _conf_hash()
    try:
        remembered = json.loads(memory.read_text())
    except (OSError, ValueError):
        remembered = {}
    if not isinstance(remembered, dict) or remembered.get("key") != key:
        remembered = {"key": key, "sweeps": {}}
    known = remembered["sweeps"]
    sought, asked = {}, {}
    for name in experiments:
        narrowed = [] if full else brief(name, overrides)
        narrowed = narrowed + spared(name, [*overrides, *narrowed])
        sought[name] = " ".join([name, *overrides, "of", *narrowed])
        asked[sought[name]] = (name, overrides, narrowed)
    unknown = [key for key in asked if key not in known]
    known |= zip(unknown, _each_composed([asked[key] for key in unknown], processes), strict=True)
    found = {name: known[sought[name]] for name in experiments}
    for override in spelled_out(overrides):
        if not any(override in section["taken"] for section in found.values()):
            raise InputError(f"{override} means nothing to the sections {', '.join(experiments)}: leave it out")
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps(remembered))
    counted = any(o.startswith("document.count=") for o in overrides)
    sections = []
    for name, section in found.items():
        try:
            sections.append(_prepared(name, section))
        except TooFewWindows as error:
            if counted or error.held < FEWEST:
                raise
            # composed anew, for whatever refers to the number of windows
            count = f"document.count={error.held}"
            narrowed = [*(o for o in section["narrowed"] if not o.startswith("document.count=")), count]
            key = " ".join([name, *overrides, "of", *narrowed])
            if key not in known:
                known[key] = _composed(name, overrides, narrowed)
                memory.write_text(json.dumps(remembered))
            sections.append(_prepared(name, known[key]))
    return sections


def _prepared(name: str, section: dict) -> Section:
    """A section with its jobs checked; of those whose text is too short the one with the fewest windows is told."""
    jobs, short = [], []
    for job in section["jobs"]:
        try:
            jobs.append(prepare(job["config"] if job["resolved"] else OmegaConf.create(job["config"])))
        except TooFewWindows as error:
            short.append(error)
    if short:
        raise min(short, key=lambda error: error.held)
    choices = [job["choice"] for job in section["jobs"]]
    return Section(name, section["asked"], section["narrowed"], choices, jobs, section["taken"])
