"""Markdown as LaTeX: paragraphs, lists, emphasis, code, links."""

import re

from markdown_it import MarkdownIt

LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip
OPEN = {
    "strong_open": r"\textbf{", "em_open": r"\emph{", "bullet_list_open": "\\begin{itemize}\n",
    "list_item_open": r"\item ", "paragraph_open": "",
}  # fmt: skip
CLOSE = {
    "strong_close": "}", "em_close": "}", "link_close": "}", "bullet_list_close": "\\end{itemize}\n",
    "list_item_close": "\n", "paragraph_close": "\n\n",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found.group()], text)


def _written(token) -> str:
    if token.type == "inline":
        return "".join(_written(child) for child in token.children)
    if token.type == "text":
        return latex_text(token.content)
    if token.type == "code_inline":
        return rf"\texttt{{{latex_text(token.content)}}}"
    if token.type in ("softbreak", "hardbreak"):
        return "\n"
    if token.type == "link_open":
        return rf"\href{{{re.sub('[%#]', lambda found: chr(92) + found.group(), token.attrGet('href'))}}}{{"
    written = (OPEN | CLOSE).get(token.type)
    if written is None:
        raise ValueError(f"{token.type} of Markdown has no LaTeX here: {token.content!r}")
    return written


def latex(markdown: str) -> str:
    """The Markdown of this package's texts as LaTeX."""
    return "".join(_written(token) for token in MarkdownIt("commonmark", {"html": False}).parse(markdown)).strip()
