"""Markdown as LaTeX, and the document through a real LaTeX."""

import re
import shutil
import subprocess

import pytest

from pipeline.paper.latex import latex


def test_emphasis_lists_and_code():
    assert latex("**a_b** and *c* `d{e}` 50 %") == r"\textbf{a\_b} and \emph{c} \texttt{d\{e\}} 50 \%"
    found = latex("One:\n\n- **x** & y\n- z\n  goes on")
    assert found.startswith("One:\n\n\\begin{itemize}\n\\item \\textbf{x} \\& y")
    assert found.count(r"\item") == 2 and "z\ngoes on" in found and found.endswith(r"\end{itemize}")


def test_links_keep_their_addresses_and_nothing_is_lost_in_silence():
    assert latex("[a_b](https://x.org/a_b%20c#d)") == r"\href{https://x.org/a_b\%20c\#d}{a\_b}"
    with pytest.raises(ValueError, match="heading_open of Markdown has no LaTeX"):
        latex("# A head")


@pytest.mark.faults
def test_the_document_compiles_and_has_everything(regenerated, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("there is no LaTeX: apt-get install texlive-latex-recommended texlive-fonts-recommended")
    folder, _ = regenerated
    work = tmp_path / "tex"
    shutil.copytree(folder, work)
    for _ in range(2):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", timeout=300)
        assert done.returncode == 0, done.stdout[-2000:]
    log = (work / "paper.log").read_text(errors="replace")
    assert "undefined" not in log.lower().replace("undefined font", "") and "Missing character" not in log
    pages = int(re.search(r"Output written on paper\.pdf \((\d+) pages", log)[1])
    assert pages >= 5 and log.count("<./figures/") + log.count("<figures/") >= 5
