import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from pipeline.paper.latex import latex_text
from pipeline.paper.table import Column, Table, listing

SPECIAL = {
    "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
}  # fmt: skip


@pytest.mark.parametrize(("character", "escaped"), SPECIAL.items())
def test_every_character_that_latex_reads_itself_is_escaped(character, escaped):
    assert latex_text(f"a{character}b") == f"a{escaped}b"


def test_escapes_are_not_escaped_again():
    assert latex_text(r"\_{") == r"\textbackslash{}\_\{"


def unescaped(source: str) -> list[str]:
    """Characters with a meaning of their own that are left once commands, groups and the alignment are taken away."""
    text = re.sub(r"\\[_%&#${}]", "", source)
    text = re.sub(r"\\text[a-z]+\{\}", "", text)
    text = re.sub(r"\\(begin|end|caption|label|toprule|midrule|bottomrule|\\)", "", text)
    return re.findall(r"[_%#$~^\\]", text)


def test_a_whole_table_compiles_whatever_it_holds():
    everything = "".join(SPECIAL)
    cells = pd.DataFrame({f"x{everything}": [f"y{everything}", "1 [0, 2] *"], "KL(full || compressed)": ["-", "a < b"]})
    source = Table("with_a_name", f"ND-PPL = (PPL - PPL_full) / PPL_full {everything}", cells, cells, "").latex()
    assert unescaped(source) == []
    assert source.count("{") - source.count(r"\{") == source.count("}") - source.count(r"\}")
    rows = [line for line in source.splitlines() if line.endswith(r"\\") and "x" + latex_text("_") in line]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)&", rows[0])) == 1  # two columns
    assert unescaped(r"\caption{PPL_full}") == ["_"]  # what the published tables once had


def test_stars_survive_holm_over_the_whole_table(made):
    """One column of ten differences: one is beyond doubt, one has p of about .02 alone, the others none."""
    noise = np.array([0.03, -0.02, 0.01, -0.03, 0.02, -0.01, 0.02, -0.02])
    error = noise.std(ddof=1) / np.sqrt(8)
    base = made("streaming", {"x": [0.0] * 8})
    shifts = [1.0, 3 * error, *[0.1 * error] * 8]
    runs = [made(f"m{i}", {"x": list(noise + shift)}) for i, shift in enumerate(shifts)]
    assert ttest_1samp(noise + shifts[1], 0).pvalue < 0.05
    heads = {"method": lambda run: run.title}
    columns = [Column("x", "difference", difference=True)]
    found = listing("t", "t", [base, *runs], heads, columns, "Note.", lambda run: base)
    stars = [cell.endswith(" *") for cell in found.cells["difference"]]
    assert stars == [False, True] + [False] * 9
    assert found.cells["difference"].iloc[0] == "-" and "after Holm" in found.note
    (alone,) = listing("t", "t", runs[1:2], heads, columns, "", lambda run: base).cells["difference"]
    assert alone.endswith(" *")
