"""Figures as files, drawn again only where they would be others."""

import hashlib
import io
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pipeline.paper.measured import MeasuredSection
from pipeline.settings.folders import PACKAGE

DECISIVE = ("matplotlib", "kiwisolver", "pillow", "numpy", "pandas", "scipy")  # packages that may change a drawing


@dataclass(frozen=True)
class Drawn:
    """A figure in the document."""

    name: str
    caption: str


def _decided(there: dict[str, MeasuredSection]) -> str:
    """Hash of all that decides what figures look like: every value of the runs, our sources, versions of packages."""
    digest = hashlib.sha256(json.dumps([platform.python_version(), *map(version, DECISIVE)]).encode())
    for path in sorted(path for kind in ("py", "yaml") for path in PACKAGE.rglob(f"*.{kind}")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    for experiment, section in there.items():
        for run in section.runs:
            about = [experiment, run.run_id, run.choice, run.count, run.metrics, run.tags]
            digest.update(json.dumps(about, sort_keys=True).encode() + run.text.encode())
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, str]:
    """Hashes of the files in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _remembered(folder: Path, memory: Path, decided: str) -> dict[str, list[Drawn]] | None:
    """What was drawn into a folder, if all of it would be the same and lies there as it was written."""
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
        if found["decided"] != decided or found["files"] != _files(folder):
            return None
        return {experiment: [Drawn(**one) for one in own] for experiment, own in found["drawn"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _anew(there: dict[str, MeasuredSection], folder: Path) -> dict[str, list[Drawn]]:
    import matplotlib.pyplot as plt

    from pipeline.paper.figures import FIGURES, STYLE
    from pipeline.paper.hover import titled

    for old in folder.iterdir():
        old.unlink()
    drawn: dict[str, list[Drawn]] = {}
    with plt.style.context(STYLE, after_reset=True):  # a matplotlibrc of somebody's own decides nothing
        for name, (function, experiment, caption) in FIGURES.items():
            if (figure := function(there)) is not None:
                figure.savefig(folder / f"{name}.png", metadata={"Software": None})
                figure.set_layout_engine("none")  # the layout stays; it need not be found again
                drawing = io.StringIO()
                figure.savefig(drawing, format="svg", metadata={"Date": None})
                (folder / f"{name}.svg").write_text(titled(drawing.getvalue()), encoding="utf-8")
                plt.close(figure)
                drawn.setdefault(experiment, []).append(Drawn(name, caption))
    return drawn


def draw(sections: list[MeasuredSection], folder: Path, memory: Path) -> dict[str, list[Drawn]]:
    """Figures of the sections that are not withheld, as PNG and SVG; what stands in which section.

    Parameters
    ----------
    folder : Path
        Of the figures; nothing else stays in it.
    memory : Path
        A file that holds what decided the figures, and hashes of them.
    """
    there = {section.experiment: section for section in sections if not section.withheld}
    decided = _decided(there)
    drawn = _remembered(folder, memory, decided)
    if drawn is None:
        drawn = _anew(there, folder)
        own = {experiment: [asdict(one) for one in figures] for experiment, figures in drawn.items()}
        written = {"decided": decided, "files": _files(folder), "drawn": own}
        memory.write_text(json.dumps(written), encoding="utf-8")
    return drawn
