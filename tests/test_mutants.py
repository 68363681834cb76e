"""The table of small errors is up to date: each has its place in the sources, and a test that should notice it."""

import pytest

from tests.mutants import MUTANTS, ROOT, TESTS, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file} {mutant.old}")
def test_an_error_has_one_place_and_tests(mutant):
    text = (ROOT / "spectral_kv" / mutant.file).read_text()
    assert mutated(text, mutant) != text
    file, _, start = mutant.tests.partition("::")
    assert f"def {start}" in (ROOT / TESTS / file).read_text()


def test_an_error_without_its_place_is_refused():
    with pytest.raises(SystemExit, match="2 times, not once"):
        mutated("x + x", Mutant("a.py", "x", "y", "test_a.py"))
