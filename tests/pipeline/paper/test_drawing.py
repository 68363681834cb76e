"""Figures are drawn again where what they show is another, and only there."""

import importlib.metadata
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from pipeline.paper import drawing, figures
from pipeline.paper.drawing import Drawn, draw
from pipeline.paper.measured import MeasuredSection

AOP = {"aop/mean": [0.1, 0.2, 0.3, 0.2, 0.1]}


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """The figures that were drawn, by name; an empty one and none stand in for those of the document."""
    calls = []

    def bar(there):
        calls.append("bar")
        return plt.figure(figsize=(there["paper"].runs[0].metrics["aop/mean"], 0.2))

    def nothing(there):
        calls.append("nothing")

    stand_ins = {"bar": (bar, "paper", "A bar."), "nothing": (nothing, "budgets", "Not drawn.")}
    monkeypatch.setattr(figures, "FIGURES", stand_ins)
    return calls


@pytest.fixture
def write(made, drawn, tmp_path):
    """Draws a section of one run, which may be changed; whether anything was drawn."""
    folder = tmp_path / "figures"
    folder.mkdir()

    def write(experiment: str = "paper", **changed) -> bool:
        drawn.clear()
        run = replace(made("tri", AOP), **changed)
        section = MeasuredSection(experiment, "title", 5, [], [run])
        found = draw([section], folder, tmp_path / "drawn.json")
        assert found == {"paper": [Drawn("bar", "A bar.")]}
        assert sorted(path.name for path in folder.iterdir()) == ["bar.png", "bar.svg"]
        return bool(drawn)

    write.folder, write.memory = folder, tmp_path / "drawn.json"
    return write


def test_a_second_time_the_first_files_serve(write):
    assert write()
    first = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in write.folder.iterdir()}
    assert not write()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in write.folder.iterdir()} == first


@pytest.mark.parametrize("changed", ["metrics", "tags", "choice", "count", "run_id", "read_rows"])
def test_another_run_is_drawn(made, write, changed):
    run = made("tri", AOP)
    other = {
        "metrics": run.metrics | {"aop/mean_low": 0.11}, "tags": run.tags | {"title": "Tri"},
        "choice": {"method": "tri", "budget.tokens": "512"}, "count": 6, "run_id": "another",
        "read_rows": lambda: run.read_rows().replace("0.3", "0.4"),
    }  # fmt: skip
    write()
    assert write(**{changed: other[changed]}) and not write(**{changed: other[changed]})
    assert write()  # and back again


def test_a_withheld_section_is_none(made, write):
    write()
    short = MeasuredSection("paper", "title", 6, [], [made("tri", AOP)])
    with pytest.raises(KeyError):  # the stand-in asks for it: the first drawing did not serve
        draw([short], write.folder, write.memory)


def test_another_version_of_a_package_draws_anew(write, monkeypatch):
    write()
    monkeypatch.setattr(drawing, "version", lambda name: importlib.metadata.version(name) + "1" * (name == "pillow"))
    assert write()


@pytest.mark.parametrize("name", ["show/summary.py", "paper/palette.yaml"])
def test_another_source_draws_anew(write, tmp_path, monkeypatch, name):
    sources = tmp_path / "pipeline"
    (sources / name).parent.mkdir(parents=True)
    (sources / name).write_text("one")
    monkeypatch.setattr(drawing, "PACKAGE", sources)
    write()
    assert not write()
    (sources / name).write_text("two")
    assert write()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, memory: (folder / "bar.png").write_bytes(b"another picture"),
        lambda folder, memory: (folder / "bar.svg").unlink(),
        lambda folder, memory: (folder / "left.png").write_bytes(b"of a figure that is no more"),
        lambda folder, memory: memory.write_text("{"),
        lambda folder, memory: memory.write_text("[]"),
        lambda folder, memory: memory.unlink(),
    ],
)
def test_files_that_are_not_as_they_were_written_are_drawn_anew(write, spoil):
    write()
    spoil(write.folder, write.memory)
    assert write() and not write()


def test_a_matplotlibrc_decides_nothing(write):
    write()
    first = (write.folder / "bar.png").read_bytes()
    write.memory.unlink()
    with plt.rc_context({"figure.facecolor": "red"}):
        assert write()
    assert (write.folder / "bar.png").read_bytes() == first
