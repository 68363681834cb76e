"""The page that says how to add a method is followed to the letter."""

import re
import sys
from pathlib import Path

import pytest

from pipeline.compare import documents
from pipeline.settings.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"


@pytest.fixture
def project(tmp_path, monkeypatch) -> str:
    """The files of the page in a folder of their own; returns the override that makes Hydra look there."""
    blocks = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [name for name, _ in blocks] == ["my_methods/value_norm.py", "conf/method/value_norm.yaml"]
    for name, text in blocks:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("my_methods")]:  # of another test's folder
        monkeypatch.delitem(sys.modules, name)
    return f"hydra.searchpath=[file://{tmp_path / 'conf'}]"


def test_the_worked_example_runs_and_is_measured(run, project):
    result = run(project, "method=value_norm")
    assert (result.title, result.metrics["memory/tokens"]) == ("ValueNorm", 60)
    assert 0 < result.metrics["aop/mean"] < 2
    late = run(project, "method=value_norm", "method.recency_weight=100")
    assert (documents(late)["aop/mean"] != documents(result)["aop/mean"]).any()
    assert documents(late)["aop/mean"].to_numpy() == pytest.approx(
        documents(run("method=streaming"))["aop/mean"].to_numpy()
    )


def test_its_parameters_are_checked(run, project):
    with pytest.raises(InputError, match=r"method\.recency_weight=-1"):
        run(project, "method=value_norm", "method.recency_weight=-1")
    with pytest.raises(InputError, match="did you mean recency_weight"):
        run(project, "method=value_norm", "+method.recency_wieght=1")


def test_a_method_that_was_changed_is_measured_again(run, project, tmp_path, monkeypatch):
    assert not run(project, "method=value_norm").reused
    assert run(project, "method=value_norm").reused
    file = tmp_path / "my_methods" / "value_norm.py"
    file.write_text(file.read_text().replace("return norms +", "return -norms +"))
    assert not run(project, "method=value_norm").reused
