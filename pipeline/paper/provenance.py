"""Where the numbers of a document come from: its runs, their hashes, the machine, the time."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.paper.finished import FinishedRun
from pipeline.paper.measured import MeasuredSection

TRACED = ("git.revision", "git.changed", "hash.model", "hash.document", "hash.code")
SETUP = ("hardware", "platform", "version.python", "version.torch", "version.transformers", "version.numpy")


@dataclass(frozen=True)
class Origin:
    """What the whole document is about, and how it was made."""

    model: str
    documents: str
    store: str
    command: str
    where: str = ""  # settings that lead other commands to the store, as a shell reads them


def portable(words: str) -> str:
    """A setting or an address as others can read it: a path below the working folder is written from there."""
    return re.sub(rf"(^|=|:///){re.escape(str(Path.cwd()))}/(?=.)", r"\1", words)


def by_choice(section: MeasuredSection) -> dict[str, FinishedRun]:
    """Runs by their variant, or by their method."""
    return {run.choice.get("variant", run.method): run for run in section.runs}


def timed(sections: list[MeasuredSection]) -> str:
    """When speeds were measured, for they are not measured again; nothing if there are none."""
    runs = [run for s in sections for run in s.runs if "throughput/speedup" in run.metrics]
    if not runs:
        return ""
    days = sorted({f"{datetime.fromtimestamp(run.started / 1000, UTC):%Y-%m-%d %H:%M} UTC" for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Speeds were timed on {when}; `python -m pipeline.paper --sections speed --refresh` times them again."


def setup(sections: list[MeasuredSection]) -> list[tuple[str, str]]:
    """What the runs were measured with; several values where they were not measured alike."""
    runs = [run for section in sections for run in section.runs]
    tags = [tag for name in SETUP for tag in sorted({t for r in runs for t in r.tags if t.split(":")[0] == name})]
    found = [(t, ", ".join(dict.fromkeys(run.tags[t] for run in runs if t in run.tags))) for t in dict.fromkeys(tags)]
    notes = dict.fromkeys(run.tags["timings"] for run in runs if "timings" in run.tags)
    return found + ([("times", ", ".join(notes))] if notes else [])


def traced(sections: list[MeasuredSection]) -> list[dict[str, str]]:
    """One line a run: for what it was measured, in how many sections, and its hashes."""
    lines: dict[str, dict[str, str]] = {}
    for section in sections:
        for run in section.runs:
            choice = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in run.choice.items())
            line = lines.setdefault(
                run.run_id,
                {
                    "what": f"{section.experiment}: {choice}",
                    "run": run.run_id,
                    "identity": run.tags["identity"],
                    "documents": run.tags["hash.document"],
                },
            )
            if not line["what"].startswith(f"{section.experiment}:"):
                line["what"] += f"; {section.experiment}: {choice}"
    return list(lines.values())


def hashes(sections: list[MeasuredSection]) -> list[tuple[str, str]]:
    """Every hash that runs share, and the sections that they are in."""
    everything = [run for section in sections for run in section.runs]
    found = []
    for tag in TRACED:
        for value in dict.fromkeys(run.tags.get(tag, "-") for run in everything):
            of = [s.experiment for s in sections if any(run.tags.get(tag, "-") == value for run in s.runs)]
            found.append((f"{tag} of {', '.join(of)}", value))
    return found
