"""Cells of the page, taken apart."""

import pandas as pd

from pipeline.paper.report import cell, listed, unbroken
from pipeline.paper.table import Table


def test_numbers_intervals_and_words():
    found = cell("-0.010 [-0.014, -0.006] *", ["a"])
    assert (found.number, found.interval, found.star, found.value) == ("-0.010", "[-0.014, -0.006]", True, -0.010)
    assert cell("[-0.010, +0.004], p 0.1", ["a"]).value == -0.010  # sorted by where it begins, and linked
    assert cell("[+0.050, +0.070], p 1e-05", ["a"]).value == 0.050
    assert cell("12 of 20", ["a"]).value == 12
    assert cell("supported", ["a"]).value is None and cell("-", ["a"]) == cell("-", [])


def test_columns_of_intervals_are_numbers_and_a_number_among_words_is_one():
    cells = pd.DataFrame({"within": ["[-0.010, +0.004], p 0.1", "-"], "mixed": ["0.5 *", "none"]})
    table = listed(Table("t", "T", cells, cells, "", [dict.fromkeys(cells, "run")] * 2))
    assert [column.numeric for column in table.columns] == [True, False]
    assert table.lines[0][1].star and table.lines[0][1].runs == ["run"]


def test_intervals_stay_on_one_line():
    assert unbroken("0.2 [+0.1, -0.3], p 1") == "0.2 [+0.1,\N{NO-BREAK SPACE}-0.3], p 1"
    assert unbroken("[a, b](https://x.org), [1, 2, 3]") == "[a, b](https://x.org), [1, 2, 3]"
