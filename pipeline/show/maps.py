"""Figures of one run: which tokens were kept, and where attention suffers. They are drawn, not interpreted, here."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

BINS = 256  # of token positions in a map


def _picture(image: np.ndarray, width: float, xlabel: str, title: str, top: float | None, xmax: float) -> Figure:
    """An image with a row a layer. No layout engine and no colour bar: they would take most of the time."""
    height = 0.85 + 0.2 * len(image)  # inches
    figure = Figure(figsize=(width, height), dpi=80)
    axes = figure.add_axes((0.55 / width, 0.45 / height, 1 - 0.65 / width, 1 - 0.75 / height))
    axes.imshow(
        image, aspect="auto", interpolation="nearest", vmin=0, vmax=top, extent=(0, xmax, len(image) - 0.5, -0.5)
    )
    axes.set_xlabel(xlabel)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize="medium")
    return figure


def kept_map(kept: Sequence[Sequence[np.ndarray]], tokens: int) -> Figure:
    """Share of tokens kept along the prompt, one row a layer: dark is none, light is all.

    Parameters
    ----------
    kept : sequence of sequences of np.ndarray of int, [kept], one a layer and KV head
    tokens : int
        Length of the prompt.
    """
    edges = np.linspace(0, tokens, min(BINS, tokens) + 1)
    there = np.histogram(np.arange(tokens), edges)[0]
    shares = np.stack([np.histogram(np.concatenate(layer), edges)[0] / (there * len(layer)) for layer in kept])
    return _picture(shares, 7.0, "token of the prompt", "tokens kept: dark none, light all", 1.0, tokens)


def by_layer(rows: pd.DataFrame, metric: str) -> Figure | None:
    """A metric by layer and query head, mean over documents; None if `rows` do not have it so."""
    fine = rows[(rows["metric"] == metric) & rows["layer"].notna() & rows["head"].notna()]
    if fine.empty:
        return None
    table = fine.astype({"value": float}).pivot_table(index="layer", columns="head", values="value", aggfunc="mean")
    image = table.to_numpy()
    title = f"{metric}: dark 0, light {image.max():.2g}"
    return _picture(image, 4.5, "query head", title, max(image.max(), 1e-12), image.shape[1])
