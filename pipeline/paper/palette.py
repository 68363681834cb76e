"""What a method looks like, in figures and on the page."""

from functools import cache
from importlib.resources import files

import yaml


@cache
def palette() -> dict[str, dict[str, str]]:
    """Colour and marker of every method."""
    return yaml.safe_load(files("pipeline.paper").joinpath("palette.yaml").read_text(encoding="utf-8"))


def look(method: str) -> dict[str, str]:
    """How a method is drawn; one that the palette lacks is grey."""
    return palette().get(method, {"color": "#999999", "marker": "."})
