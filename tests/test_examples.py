"""Every snippet of the page about one's own code, and every example, as they stand."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "use_in_your_code.md"
SHORT = {"long_document": ["600"], "held_budget": ["200"]}  # tokens


def test_every_snippet_of_the_page_runs():
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for number, snippet in enumerate(found):
        lines = PAGE.read_text().partition(snippet)[0].count("\n")
        exec(compile("\n" * lines + snippet, str(PAGE), "exec"), names)
        assert number == 0 or "cache" in names
    assert isinstance(names["model"], PreTrainedModel) and len(found) >= 9


def test_the_page_speaks_of_every_name_that_is_exported():
    import spectral_kv

    text = PAGE.read_text()
    assert [name for name in spectral_kv.__all__ if name not in text] == []


def run(name: str, monkeypatch, capsys) -> list[str]:
    """Lines that an example prints."""
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *SHORT.get(name, [])])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_chat_remembers_what_was_said(monkeypatch, capsys):
    answers = run("chat", monkeypatch, capsys)[1:]
    assert answers[0].startswith("31415.") and answers[1].startswith("27182.")
    held = [int(re.search(r"(\d+) held", line)[1]) for line in answers]
    assert max(held) < 96 + 8


def test_the_document_is_kept_by_a_quarter_and_answers_from_its_file(monkeypatch, capsys):
    size, *answers = run("long_document", monkeypatch, capsys)
    assert "150 kept" in size
    for line in answers:
        said, wanted = re.search(r": (.*)\. \(it is (\d+)\)|$", line).groups()
        assert said == wanted


def test_the_batch_says_what_each_prompt_says_alone(monkeypatch, capsys):
    lines = run("batch", monkeypatch, capsys)  # it compares them itself
    assert len(lines) == 3 and "16180" in lines[2]


@pytest.mark.slow
def test_the_held_budget_takes_less_memory(monkeypatch, capsys):
    whole, ours = (re.search(r"(\d+) tokens, ([\d.]+) MB", line) for line in run("held_budget", monkeypatch, capsys))
    assert whole[1] == ours[1] and float(ours[2]) < float(whole[2])


def test_every_example_is_run_here():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"chat", "long_document", "batch", "held_budget"}
    for name in names:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 45


@pytest.mark.parametrize("page", [PAGE])
def test_what_the_page_points_to_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists()
