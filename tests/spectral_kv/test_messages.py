"""The library's messages name its own parameters: no key of a configuration, no command of the pipeline."""

import ast
import re
from pathlib import Path

import pytest

import spectral_kv
from spectral_kv.scorers.h2o import H2O
from spectral_kv.selection import Budget

ROOT = Path(spectral_kv.__file__).parent
# `method=` and `storage=` are parameters of the library's own functions too
FOREIGN = re.compile(
    r"\b(method|budget|storage|phase|backend|model|document|tracking)\.\w+="
    r"|\b(phase|backend|document)=|-m pipeline|\bconf/"
)


def texts(source: str) -> list[str]:
    """The strings of a source that are no docstrings; of f-strings the parts between the braces' values."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare)
    return [node.value for node in constants if isinstance(node.value, str)]


def test_strings_are_found_in_functions_and_docstrings_are_left_out():
    assert texts('def f(x):\n    "conf/"\n    raise ValueError(f"a={x} b" "c")\n') == ["a=", " bc"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_names_a_key_or_a_command_of_the_pipeline(path):
    assert not [text for text in texts(path.read_text()) if FOREIGN.search(text)]


def test_parameters_stand_bare_in_messages():
    with pytest.raises(ValueError, match=r"^window=0 must be at least 1"):
        H2O(window=0)
    with pytest.raises(ValueError, match=r"^tokens=68 leaves nothing to choose beside sinks=4 and recent=64: give at"):
        Budget(68)
