"""What a reader is told about a mark of a figure: titles in its SVG, which browsers show under the pointer."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
SAID = "said:"  # begins the id by which matplotlib carries the words into the SVG

ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", LINK)


def say(artist: "Artist", words: str | Sequence[str]) -> None:
    """Words for an artist as a whole, or one string for every mark of it, in the order of its data."""
    artist.set_gid(SAID + json.dumps(words if isinstance(words, str) else list(words)))


def say_cells(axes: "Axes", x: Sequence[float], y: Sequence[float], words: np.ndarray) -> None:
    """Words for the cells of a picture, which are one image in the SVG: invisible rectangles lie over it.

    Parameters
    ----------
    x, y : edges of the columns and of the lines, in the coordinates of the axes
    words : np.ndarray of str, [lines, columns]
    """
    from matplotlib.collections import PolyCollection  # the page, which reads drawings alone, needs none of it

    corners = [
        [(left, low), (right, low), (right, high), (left, high)]
        for low, high in pairwise(y)
        for left, right in pairwise(x)
    ]
    cells = PolyCollection(corners, facecolors="none", edgecolors="none")
    say(cells, words.ravel().tolist())
    axes.add_collection(cells, autolim=False)


def _marks(group: ElementTree.Element) -> list[ElementTree.Element]:
    """What is drawn in a group, in order; definitions are not drawn, and a line under markers is no mark."""
    inside = {e for defs in group.iter(f"{{{SVG}}}defs") for e in defs.iter()}
    drawn = [e for e in group.iter() if e not in inside]
    return [e for e in drawn if e.tag == f"{{{SVG}}}use"] or [e for e in drawn if e.tag == f"{{{SVG}}}path"]


def _title(element: ElementTree.Element, words: str) -> None:
    title = ElementTree.Element(f"{{{SVG}}}title")
    title.text = words
    element.insert(0, title)


def titled(svg: str) -> str:
    """The SVG with the words that were said about its artists as titles.

    Words for single marks are left out where not as many marks were drawn, as when some lie outside the picture.
    """
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for element in list(root.iter()):
        if not element.get("id", "").startswith(SAID):
            continue
        words = json.loads(element.attrib.pop("id").removeprefix(SAID))
        if isinstance(words, str):
            _title(element, words)
        elif len(marks := _marks(element)) == len(words):
            for mark, own in zip(marks, words, strict=True):
                _title(mark, own)
    return ElementTree.tostring(root, encoding="unicode")


def inline(svg: str, name: str, caption: str) -> str:
    """The SVG as part of a page: as wide as its place, on the page's own ground, its ids apart from other figures'."""
    root = ElementTree.fromstring(svg)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", caption)
    used = {word for e in root.iter() for value in e.attrib.values() for word in _referred(value)}
    for element in root.iter():
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            for word in _referred(value):
                value = value.replace(f"#{word}", f"#{name}-{word}")
            ground = element.tag == f"{{{SVG}}}path"  # white letters stay: they stand on dark cells
            element.set(key, value.replace("fill: #ffffff", "fill: none") if ground else value)
    return ElementTree.tostring(root, encoding="unicode")


def _referred(value: str) -> list[str]:
    """Ids that an attribute refers to."""
    if value.startswith("#"):
        return [value[1:]]
    return [part.split(")")[0] for part in value.split("url(#")[1:]]
