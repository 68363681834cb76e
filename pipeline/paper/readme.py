"""A copy of the main result and the verdicts in another document, between two markers, and of tables beside it."""

import shutil
from pathlib import Path

from pipeline.settings.errors import InputError

BEGIN, END = "<!-- results -->", "<!-- /results -->"
FIGURES = ("frontier", "windows", "kept_tokens")  # that the copies show, from docs/figures beside the document
TABLES = "published_tables.md"  # in docs beside the document


def refresh(path: Path, text: str, tables: str, figures: Path) -> None:
    """Replace what stands between the markers of a Markdown file, and the tables and figures in `docs` beside it.

    Raises
    ------
    InputError
        If the file has no markers, or a figure is not there.
    """
    document = path.read_text(encoding="utf-8") if path.is_file() else ""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise InputError(f"--readme {path} has no {BEGIN} and {END}: write both where the results shall stand")
    for name in FIGURES:
        if not (figures / f"{name}.png").is_file():
            raise InputError(f"--readme {path} shows the figure {name}, which was not drawn: leave --sections out")
    before, rest = document.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}", encoding="utf-8")
    folder = path.parent / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / TABLES).write_text(f"{tables.strip()}\n", encoding="utf-8")
    for name in FIGURES:
        shutil.copyfile(figures / f"{name}.png", folder / f"{name}.png")
