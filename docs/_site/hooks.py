"""Pages of the site that lie outside of docs, and what links between files are there."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "LOG.md": "log.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)]*)?\)")


def on_files(files, config):
    """README, log and changelog are pages, too."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """A link to a page leads to the page; one to another file of the project is its name, for a site has no sources."""
    here = page.file.src_uri
    source = next((source for source, own in PAGES.items() if own == here), f"docs/{here}")

    def moved(link: re.Match) -> str:
        picture, text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        own = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if own is None and (ROOT / path).exists():
            return text if text.startswith("`") else f"`{path}`" if path.endswith(text) else f"{text} (`{path}`)"
        place = posixpath.relpath(own or path, posixpath.dirname(here) or ".")
        return f"{picture}[{text}]({place}{anchor})"

    return LINK.sub(moved, markdown)
