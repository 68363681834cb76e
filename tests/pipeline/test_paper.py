import numpy as np
import pandas as pd
import pytest

from pipeline.paper.tables import TABLES, agreement, build, published, render

SPEC = {spec.name: spec for spec in TABLES}


def runs(values: dict[str, float], metric: str) -> pd.DataFrame:
    frame = pd.DataFrame({f"metrics.{metric}": values})
    frame["tags.title"] = frame.index.str.upper()
    frame["run_id"] = "id-" + frame.index
    return frame


def test_ranks_and_tau_by_hand():
    numbers = {"a": {"nd": 0.1}, "b": {"nd": 0.2}, "c": {"nd": 0.3}}
    table = build(SPEC["perplexity"], runs({"a": 1.0, "b": 3.0, "c": 2.0, "extra": 0.0}, "ppl/nd"), numbers)
    assert table.index.tolist() == ["a", "c", "b", "extra"]
    assert table["rank_ours"].tolist()[:3] == [1, 2, 3]
    assert table["rank_published"].tolist()[:3] == [1, 3, 2]
    assert np.isnan(table.loc["extra", "rank_ours"])
    assert agreement(table) == pytest.approx((2 - 1) / 3)  # two of three pairs agree


def test_where_high_is_best_the_highest_is_first():
    numbers = {"a": {"ratio": 7.1}, "b": {"ratio": 1.0}}
    table = build(SPEC["memory"], runs({"a": 2.0, "b": 8.0}, "memory/ratio"), numbers)
    assert table["rank_ours"].to_dict() == {"b": 1, "a": 2}
    assert table["rank_published"].to_dict() == {"b": 2, "a": 1}
    assert agreement(table) == -1


def test_a_missing_number_is_a_dash():
    numbers = {"a": {"mean": 0.5}, "b": {"mean": 0.6}}
    table = build(SPEC["perturbation"], runs({"a": 0.2, "b": np.nan}, "aop/mean"), numbers)
    text = render(SPEC["perturbation"], table)
    assert "| B        | -" in text
    assert "tau with the published order of these methods: -." in text  # one method is no order


def test_published_numbers_are_those_of_the_card():
    numbers = published()
    assert {name: len(rows) for name, rows in numbers.items()} == {"memory": 6, "perturbation": 6, "perplexity": 6}
    aop = sorted(numbers["perturbation"], key=lambda m: numbers["perturbation"][m]["mean"])
    ppl = sorted(numbers["perplexity"], key=lambda m: numbers["perplexity"][m]["nd"])
    assert aop == ["wavelet", "wavelet_tri", "wavelet_fourier", "fourier", "tri", "turboquant"]
    assert ppl == ["turboquant", "wavelet_tri", "tri", "wavelet", "wavelet_fourier", "fourier"]
    assert sum(row["mean"] for row in numbers["perturbation"].values()) == pytest.approx(3.289)
    assert sum(row["max"] for row in numbers["perturbation"].values()) == pytest.approx(21.428)
    assert sum(row["nd"] for row in numbers["perplexity"].values()) == pytest.approx(18.598)
    assert sum(row["comp"] for row in numbers["perplexity"].values()) == pytest.approx(24.75)


def test_the_paper_measures_what_is_missing_and_nothing_twice(small, monkeypatch, capsys, tmp_path):
    from pipeline.paper.__main__ import main

    arguments = [*[o for o in small if not o.startswith("model=")], "model=qwen2_5_0_5b"]
    monkeypatch.setattr("sys.argv", ["pipeline.paper", *arguments])
    main()
    first = capsys.readouterr().out
    assert "9 configurations measured, 0 were there already" in first
    folder = tmp_path / "outputs" / "paper"
    tables = (folder / "tables.md").read_text()
    assert tables.count("Kendall's tau") == 3
    frame = pd.read_csv(folder / "perplexity.csv", index_col="option")
    assert frame.loc["wavelet_tri", "published"] == 2.353
    assert f"{frame.loc['tri', 'ours']:.3f}" in tables
    main()
    assert "0 configurations measured, 9 were there already" in capsys.readouterr().out
    assert (folder / "tables.md").read_text() == tables
