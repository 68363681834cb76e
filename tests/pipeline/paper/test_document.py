"""The document from a small store whose runs are made up, so that every number can be computed by hand."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from pipeline.paper.__main__ import _origin
from pipeline.paper.latex import latex_text
from pipeline.paper.provenance import portable
from pipeline.paper.sections import plan
from pipeline.settings.config import TrackingConfig
from tests.pipeline.paper.made_up import AOP


def test_numbers_of_the_document_are_those_of_the_store(regenerated):
    folder, printed = regenerated
    assert "0 configurations measured, 9 were there already" in printed
    text = (folder / "paper.md").read_text()
    table = pd.read_csv(folder / "tables" / "published_perturbation.csv", index_col="option")
    for method, base in AOP.items():
        assert table.loc[method, "ours"] == pytest.approx(base + 0.075)
    ranks = {"turboquant": 1, "tri": 2, "wavelet_tri": 3, "wavelet": 4, "fourier": 5, "wavelet_fourier": 6}
    theirs = {"wavelet": 1, "wavelet_tri": 2, "wavelet_fourier": 3, "fourier": 4, "tri": 5, "turboquant": 6}
    assert table.index[:6].tolist() == list(ranks)  # best first
    pairs = [(a, b) for i, a in enumerate(ranks) for b in list(ranks)[i + 1 :]]
    tau = np.mean([np.sign((ranks[a] - ranks[b]) * (theirs[a] - theirs[b])) for a, b in pairs])
    assert f"Kendall's tau with the published order: {tau:+.2f} " in text or f"order: {tau:+.2f};" in text
    low, high = (table.loc["wavelet", f"ours_{bound}"] for bound in ("low", "high"))
    assert f"| WaveletKV        | 0.475 [{low:.3f}, {high:.3f}]" in text
    assert low < 0.475 < high


def test_what_is_missing_is_a_dash(regenerated):
    folder, _ = regenerated
    text = (folder / "paper.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| Random") and "0.975" in x)
    assert line.split("|")[3].strip() == "-"  # Random was not published
    assert "| AOP max" in text and "nan" not in text.lower().replace("finance", "")


def test_verdicts_follow_from_the_numbers(regenerated):
    folder, printed = regenerated
    verdicts = {c["id"]: c for c in json.loads((folder / "results.json").read_text())["claims"]}
    assert verdicts["finding-1"]["verdict"] == "contradicted"
    # WaveletKV - 0.82 x TurboQuant: 0.4 + 0.01 d - 0.82 (0.1 + 0.01 d), on average 0.475 - 0.82 x 0.175
    deciding = "aop/mean, WaveletKV - 0.82 x TurboQuant-4bit: 0.332 ["
    assert verdicts["finding-1"]["deciding"].startswith(deciding)
    assert verdicts["finding-3"]["verdict"] == "supported"  # on memory alone
    assert verdicts["finding-4"]["verdict"] == "contradicted"  # it rises by 0.12 like all others
    assert verdicts["table-drift-fourier"]["verdict"] == "supported"
    assert verdicts["table-drift-fourier"]["deciding"].startswith(
        "drift/aop_line - 0.05 x drift/aop_first of FourierKV"
    )
    assert verdicts["finding-4"]["control"].startswith("drift/aop_line of Random: 0.120 [")
    assert "5 not measured" in printed
    assert verdicts["table-compression"]["verdict"] == "supported"
    text = (folder / "paper.md").read_text()
    assert "0.9 \u2020" not in text and "- 0.05 \u2020 (2026-11-25): the card calls" in text
    for claim in verdicts.values():
        assert f"{claim['verdict']:<14} {claim['source']}: {claim['statement']}" in printed
        assert claim["deciding"] in printed


def test_files_and_origin(regenerated):
    folder, _ = regenerated
    names = {path.name for path in (folder / "tables").iterdir()}
    assert {"published_drift.csv", "published_drift.tex", "prediction.csv"} <= names
    assert "\\toprule" in (folder / "tables" / "published_drift.tex").read_text()
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {
        f"{n}.{e}"
        for n in ("layers_and_heads", "windows", "aop_against_kl", "kept_tokens", "spectra")
        for e in ("png", "svg")
    }
    text = (folder / "paper.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert len(results["sections"]["paper"]) == 9
    for run in results["sections"]["paper"]:
        assert run["run"] in text and run["identity"] in text
        assert run["metrics"]["aop/mean"] == pytest.approx(AOP[run["choice"]["method"]] + 0.075)
    assert "| git.revision of paper | abc |" in text
    assert "- platform: a machine" in text and "- version.python: 3.11" in text


def test_the_tex_has_what_the_verdicts_are_controlled_by(regenerated):
    folder, _ = regenerated
    tex = (folder / "paper.tex").read_text()
    for claim in json.loads((folder / "results.json").read_text())["claims"]:
        assert not claim["control"] or latex_text(claim["control"]) in tex
    assert "drift/aop\\_line of Random: 0.120 [" in tex


def test_paths_below_the_working_folder_are_written_from_there(monkeypatch, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert portable(f"sqlite:///{here}/outputs/mlflow.db") == "sqlite:///outputs/mlflow.db"
    assert portable(f"model.path={here}/a b") == "model.path=a b" and portable(f"{here}/x.md") == "x.md"
    for elsewhere in (f"outputs=/mnt{here}/x", f"outputs={here}-2/x", f"outputs={here}", "outputs=x"):
        assert portable(elsewhere) == elsewhere
    general = [f"outputs={here}/my runs"]
    first = SimpleNamespace(
        model=SimpleNamespace(title="m"), documents=SimpleNamespace(tokens=1, continuation=1, source="s"),
        tracking=TrackingConfig(None, "x"), outputs=here / "my runs",
    )  # fmt: skip
    monkeypatch.setattr("sys.argv", ["paper", *general])
    origin = _origin([SimpleNamespace(experiment="paper", jobs=[SimpleNamespace(settings=first)])], general)
    assert origin.store == "sqlite:///my runs/mlflow.db" and origin.where == "'outputs=my runs'"
    assert origin.command == "python -m pipeline.paper 'outputs=my runs'"


def test_the_main_result_is_said_first(regenerated):
    """All five beat StreamingLLM by exactly the same in every window, which says nothing of windows to come."""
    folder, printed = regenerated
    text = (folder / "paper.md").read_text()
    first = "None of the 5 published methods that prune beats keeping the latest tokens on AOP, ND-PPL and KL."
    assert text.splitlines()[2] == f"**{first}**" and first in printed
    assert "- **AOP** (StreamingLLM 0.775 [" in text and "undecided: TriAttentionKV -0.500" in text
    assert json.loads((folder / "results.json").read_text())["main_result"][0] == first
    table = pd.read_csv(folder / "tables" / "beside_recency.csv")
    assert set(table["verdict"]) == {"open"} and len(table) == 3 * 6  # five and random


def test_with_fewer_documents_than_asked_for_there_is_no_table(store, tmp_path, monkeypatch):
    from dataclasses import replace

    from pipeline.paper.document import Drawn, Origin, write, write_results
    from pipeline.paper.measured import measure
    from pipeline.paper.placement import Placements

    placements = Placements(tmp_path / "placements.json")
    (section,) = measure(plan(["paper"], store, tmp_path / "compositions.json"), placements, print)[0]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.paper.document.draw", lambda sections, folder, memory: {})  # takes seconds
        whole = write([section], Origin("m", "d", "s", "c"), tmp_path / "whole")
    assert whole.excerpt().startswith("**None of the 5 published methods that prune beats keeping the latest tokens")
    assert "| Key finding 1" in whole.excerpt() and "###" not in whole.excerpt()  # tables have a document of their own
    write_results(
        replace(whole, shown=[replace(s, figures=[Drawn("x", "A figure")]) for s in whole.shown]), tmp_path / "r"
    )
    alone, runs = (tmp_path / "r.md").read_text(), pd.read_csv(tmp_path / "r.csv")
    assert alone == (tmp_path / "whole" / "paper.md").read_text()  # figures would lie elsewhere
    assert list(runs["method"]) == [run.title for run in section.runs] and set(runs["model"]) == {"m"}
    assert "## Attention output perturbation (AOP; lower is better)" in whole.published_tables()
    short = replace(section, runs=[*section.runs[:-1], replace(section.runs[-1], count=section.asked - 1)])
    document = write([short], Origin("m", "d", "s", "c"), tmp_path / "short")
    text = (tmp_path / "short" / "paper.md").read_text()
    assert "Withheld: measured on 19 documents, and the section paper asks for 20" in text
    assert document.verdicts == [] and "###" not in text
    assert list((tmp_path / "short" / "tables").iterdir()) == list((tmp_path / "short" / "figures").iterdir()) == []


@pytest.mark.slow
def test_two_models_side_by_side(store, record, folder, tmp_path, monkeypatch, capsys):
    """The second model is the first with another seed, and orders the methods as they were published."""
    from pipeline.paper.__main__ import main

    published = ("full", "wavelet", "wavelet_tri", "wavelet_fourier", "fourier", "tri", "turboquant")
    other = {method: 0.1 * rank for rank, method in enumerate((*published, "streaming", "random"))}
    record([*store, "seed=1"], other)
    general = [o for o in store if not o.startswith("model")]

    def stand_in(experiments: list[str], overrides: list[str], memory: Path, full: bool, *shared):
        name = overrides[0].removeprefix("model=")
        assert overrides[1:] == general
        return plan(experiments, [*store, f"model.name={name}", f"seed={int(name == 'second')}"], memory, full)

    monkeypatch.setattr("pipeline.paper.__main__.plan", stand_in)
    monkeypatch.setattr("pipeline.paper.document.draw", lambda sections, folder, memory: {})  # takes seconds
    command = ["pipeline.paper", "--sections", "paper", "--models", "first,second", "--results", str(tmp_path / "both")]
    monkeypatch.setattr("sys.argv", [*command, *general])
    main()
    printed, paper = capsys.readouterr().out, folder / "outputs" / "paper"
    assert "0 configurations measured, 18 were there already" in printed
    (order,) = [x.split() for x in printed.splitlines() if x.startswith('Table "Attention output')]
    assert order[-3:] == ["undecided", "supported", "no"]
    assert "Verdicts of first and second: " in printed.replace("**", "")
    first, second = ((paper / path).read_text() for path in ("paper.md", "second/paper.md"))
    assert "## Over models" in first and "Model first, unless" in first
    page = (paper / "index.html").read_text()
    assert "<h2>Over models</h2>" in page
    found = pd.read_csv(paper / "tables" / "models_perturbation.csv", index_col="option")
    for model in ("first", "second"):  # its numbers lead to its runs, which are there
        run = found.loc["tri", f"{model}: run"]
        assert f'data-runs="{run}"' in page and f'id="run-{run}"' in page and f"{model}, paper: method tri" in page
    links = {run for runs in re.findall('data-runs="([^"]+)"', page) for run in runs.split()}
    assert len(links) == 18 and links == set(re.findall('id="run-([^"]+)"', page))
    assert "\\section{Over models}" in (paper / "paper.tex").read_text()
    assert "## Over models" not in second and "Model second;" in second
    tau = kendalltau([AOP[m] for m in other if m != "full"], [other[m] for m in other if m != "full"]).statistic
    ranks = pd.read_csv(paper / "tables" / "models_ranks.csv").set_index("metric")
    assert ranks.loc["aop/mean", "tau"] == pytest.approx(tau)
    assert ranks.loc["aop/mean", "methods"] == 8
    assert {len(json.loads((paper / "results.json").read_text())["models"][m]) for m in ("first", "second")} == {12}
    alone, runs = (tmp_path / "both.md").read_text(), pd.read_csv(tmp_path / "both.csv")
    assert "- platform: a machine" in alone and "| git.revision, second | abc |" in alone
    assert runs.groupby("model").size().to_dict() == {"first": 9, "second": 9}


def test_what_several_models_need(store, tmp_path):
    from pipeline.paper.__main__ import regenerate
    from pipeline.settings.errors import InputError

    with pytest.raises(InputError, match="--models chooses the models, and so does model="):
        regenerate(["paper"], store, models=["first", "second"])


def test_the_readme_gets_a_copy_between_its_markers(tmp_path):
    from pipeline.paper.readme import refresh
    from pipeline.settings.errors import InputError

    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- results -->\nold\n<!-- /results -->\n\nEnd\n")
    figures = tmp_path / "drawn"
    figures.mkdir()
    with pytest.raises(InputError, match="frontier, which was not drawn"):
        refresh(readme, "new", "tables", figures)
    for name in ("frontier", "windows", "kept_tokens"):
        (figures / f"{name}.png").write_bytes(name.encode())
    refresh(readme, "new", "tables", figures)
    refresh(readme, "newer", "later tables", figures)
    expected = "# Title\n\n<!-- results -->\n\nnewer\n\n<!-- /results -->\n\nEnd\n"
    assert readme.read_text() == expected
    assert (tmp_path / "docs" / "published_tables.md").read_text() == "later tables\n"
    assert (tmp_path / "docs" / "figures" / "frontier.png").read_bytes() == b"frontier"
    with pytest.raises(InputError, match="has no <!-- results -->"):
        refresh(figures / "frontier.png", "new", "tables", figures)
