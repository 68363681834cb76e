"""What the README and the pages point at is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_commands_that_write_results_name_those_that_are_there():
    """So that who runs one again can compare."""
    text = "\n".join(page.read_text() for page in PAGES)
    written = set(re.findall(r"--(?:results|out) (docs/results/\w+)", text))
    results = {str(file.relative_to(ROOT).with_suffix("")) for file in (ROOT / "docs" / "results").glob("*.md")}
    assert written == results


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.faults
def test_the_site_builds_without_a_dead_link_and_asks_no_network(tmp_path):
    """In strict mode mkdocs fails on a link or an anchor that leads nowhere, and on a page that it does not list."""
    pytest.importorskip("mkdocs", reason="pip install 'spectral-kv[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").glob("*.md"))) + 3
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert [address for address in loaded if "canonical" not in address] == [], page.name
