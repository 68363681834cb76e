"""Figures of the document; a method looks the same in all of them."""

from collections.abc import Callable

import matplotlib
import numpy as np
import pandas as pd

from pipeline.paper import recency
from pipeline.paper.finished import FinishedRun
from pipeline.paper.hover import say, say_cells
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.palette import look
from pipeline.paper.tables import coded, smaller
from pipeline.show.summary import spread
from pipeline.statistics import Estimate, differences, estimate, kendall

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "spectral-kv",  # the same numbers give the same file
    "svg.fonttype": "none",
}
MAPPED = ("fourier", "wavelet", "wavelet_fourier", "wavelet_tri", "tri", "streaming")  # of the maps: methods that prune


def _line(axes: Axes, run: FinishedRun, x: list[float], values: list[Estimate], at: str) -> None:
    """A curve with its 95 % band; `at` says what a place on the x axis is called."""
    style = look(run.method)
    (line,) = axes.plot(x, [v.mean for v in values], label=run.title, lw=1.4, ms=5, **style)
    say(line, [f"{run.title}, {at.format(place)}: {spread(v, '{:.3f}')}" for place, v in zip(x, values, strict=True)])
    low, high = ([getattr(v, bound) for v in values] for bound in ("low", "high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)


def _outside(figure: Figure, axes: Axes) -> None:
    """The legend of one axes beside all of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


STORAGES = {
    "dense": "16 bits",
    "turboquant_4bit": "4-bit codes",
    "turboquant_3bit": "3-bit codes",
    "turboquant_2bit": "2-bit codes",
}
QUALITY = "KL(full || compressed), nats (log scale)"


def frontier(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Prediction against bytes: over budgets in 16 bits, with the whole prompt in codes, and over storages."""
    if "budgets" not in sections:
        return None
    runs = sections["budgets"].runs
    others = sections["equal_bytes"].runs if "equal_bytes" in sections else []
    figure, grid = plt.subplots(1, 2 if others else 1, figsize=(9.0, 4.0), sharey=True, squeeze=False)
    left = grid[0, 0]
    for method in dict.fromkeys(run.method for run in runs):
        own = sorted((run for run in runs if run.method == method), key=lambda run: run.metrics["memory/mb"])
        bytes_of = [run.metrics["memory/mb"] for run in own]
        _line(left, own[0], bytes_of, [run.estimate("ppl/kl") for run in own], "{:.2f} MB")
    for run in others:
        if run.method == "full" and (storage := run.choice["storage"]) != "dense":
            place = (run.metrics["memory/mb"], run.metrics["ppl/kl"])
            (mark,) = left.plot(*place, ls="", ms=7, label="whole prompt in codes", **look("turboquant"))
            say(
                mark,
                [f"every token, {STORAGES[storage]}, {place[0]:.2f} MB: {spread(run.estimate('ppl/kl'), '{:.3f}')}"],
            )
            left.annotate(STORAGES[storage].split()[0], place, xytext=(6, 0), textcoords="offset points", va="center")
    rivals = sections["rivals"].runs if "rivals" in sections else []
    for method in dict.fromkeys(run.method for run in rivals if run.method not in {run.method for run in runs}):
        best = min((run for run in rivals if run.method == method), key=lambda run: run.metrics["ppl/kl"])
        label = f"{best.title}, {best.choice['budget.allocation']}"
        left.plot(best.metrics["memory/mb"], best.metrics["ppl/kl"], ls="", ms=6, label=label, **look(method))
    ticks = sorted({run.metrics["memory/mb"] for run in runs})
    left.set(xscale="log", yscale="log", xlabel="cache, MB (decimal, log scale)", ylabel=QUALITY, title="over budgets")
    left.set_xticks(ticks, [f"{t:.2g}" for t in ticks])
    left.xaxis.minorticks_off()
    if others:
        _over_storages(grid[0, 1], [run for run in others if run.method != "full"])
    named = {label: h for axes in grid.ravel() for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right center")
    return figure


def rate_distortion(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Prediction against bytes of the transform coder and its rivals."""
    if "codec" not in sections:
        return None
    curves: dict[str, list[FinishedRun]] = {}
    for run in sections["codec"].runs:
        name = coded(run) if run.method == "full" else f"{run.title} in {coded(run)}"
        curves.setdefault(name.partition(",")[0] if run.method == "full" else name, []).append(run)
    figure, axes = plt.subplots(figsize=(7.4, 4.0))
    for index, (name, runs) in enumerate(curves.items()):
        runs = sorted(runs, key=smaller)
        values, ratios = [run.estimate("ppl/kl") for run in runs], [smaller(run) for run in runs]
        own = runs[0].choice["storage"].startswith("spectral")
        style = {"color": f"C{index}", "marker": "os"[index % 2] if own else "^v<>xD+*"[index % 8]}
        (line,) = axes.plot(ratios, [v.mean for v in values], lw=2 if own else 1, ms=5, label=name, **style)
        say(
            line, [f"{name}, {r:.1f} times smaller: {spread(v, '{:.4f}')}" for r, v in zip(ratios, values, strict=True)]
        )
        low, high = ([getattr(v, bound) for v in values] for bound in ("low", "high"))
        axes.fill_between(ratios, low, high, color=style["color"], alpha=0.12, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="full cache / cache (log scale)", ylabel=QUALITY)
    axes.set_xticks(ticks := [4, 6, 8, 10, 14, 20, 32], [str(t) for t in ticks])
    axes.xaxis.minorticks_off()
    _outside(figure, axes)
    return figure


def _over_storages(axes: Axes, runs: list[FinishedRun]) -> None:
    methods = dict.fromkeys(run.method for run in runs)
    stored = [storage for storage in STORAGES if any(run.choice["storage"] == storage for run in runs)]
    for method in methods:
        own = {run.choice["storage"]: run for run in runs if run.method == method}
        there = [i for i, storage in enumerate(stored) if storage in own]
        values = [own[storage].estimate("ppl/kl") for storage in stored if storage in own]
        shift = 0.7 * (list(methods).index(method) / max(len(methods) - 1, 1) - 0.5)
        means = np.array([value.mean for value in values])
        ends = np.abs(np.array([[value.low, value.high] for value in values]).T - means)
        bars = axes.errorbar(
            np.array(there) + shift, means, yerr=ends, ls="", ms=5, lw=1.2, label=next(iter(own.values())).title,
            **look(method),
        )  # fmt: skip
        title, kept = next(iter(own.values())).title, [STORAGES[stored[i]] for i in there]
        say(bars[0], [f"{title}, {s}: {spread(v, '{:.3f}')}" for s, v in zip(kept, values, strict=True)])
    megabytes = runs[0].metrics["memory/mb"]
    axes.set(title=f"the same {megabytes:.2g} MB, in other storage", xlabel="how kept tokens are stored")
    axes.set_xticks(range(len(stored)), [STORAGES[storage] for storage in stored])


def _few(count: int) -> range:
    """Which of so many layers or heads get a tick: at most ten."""
    return range(0, count, -(-count // 10))


def _maps(
    runs: list[FinishedRun], draw: Callable[[Axes, FinishedRun], object], width: float, height: float
) -> tuple[Figure, object]:
    """Small multiples, one a run, with the mappable that was drawn last."""
    columns = 3
    lines = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, sharex=True, sharey=True
    )  # fmt: skip
    drawn = None
    for axes, run in zip(grid.ravel(), runs, strict=False):
        drawn = draw(axes, run)
        axes.set_title(run.title, color=look(run.method)["color"], fontweight="bold")
        axes.spines[["top", "right"]].set_visible(True)
    for axes in grid.ravel()[len(runs) :]:
        axes.set_axis_off()
    return figure, drawn


def aop_against_kl(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Whether the error of attention says what the error of prediction is: one point a method."""
    runs = list(recency.pruned(list(sections.values())).values())
    runs = [r for r in runs if r.method not in ("full", "turboquant") and not r.method.startswith("oracle")]
    runs = [run for run in runs if {"aop/mean", "ppl/kl"} <= set(run.documents)]
    if len(runs) < 3:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for run in runs:
        x, y = run.estimate("aop/mean"), run.estimate("ppl/kl")
        ends = [[[v.mean - v.low], [v.high - v.mean]] for v in (x, y)]
        bars = axes.errorbar(
            x.mean, y.mean, xerr=ends[0], yerr=ends[1], ls="", ms=6, lw=1, label=run.title, **look(run.method)
        )
        say(bars[0], [f"{run.title}: AOP {spread(x, '{:.3f}')}, KL {spread(y, '{:.3f}')}"])
    tau = float(kendall(*(np.array([run.metrics[m] for run in runs]) for m in ("aop/mean", "ppl/kl"))))
    axes.set(xlabel="AOP", ylabel=QUALITY, yscale="log", title=f"Kendall's tau of {len(runs)} methods: {tau:+.2f}")
    _outside(figure, axes)
    return figure


def layers_and_heads(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Where attention is perturbed: mean AOP of every layer and query head."""
    if "paper" not in sections:
        return None
    runs = [run for run in sections["paper"].runs if run.method in (*MAPPED, "turboquant", "random")]

    def by_head(run: FinishedRun) -> pd.DataFrame:
        rows = run.rows[(run.rows["metric"] == "aop/mean") & run.rows["head"].notna()]
        return rows.groupby(["layer", "head"])["value"].mean().unstack()

    grids = {run.method: by_head(run) for run in runs}
    top = max(grid.to_numpy().max() for grid in grids.values())

    def draw(axes: Axes, run: FinishedRun):
        image = axes.imshow(grids[run.method], vmin=0, vmax=top, cmap="viridis", aspect="auto", origin="lower")
        lines, columns = grids[run.method].shape
        axes.set(xticks=_few(columns), yticks=_few(lines))
        values = grids[run.method].to_numpy()
        words = [
            [f"{run.title}, layer {i}, head {j}: {v:.3f}" for j, v in enumerate(line)] for i, line in enumerate(values)
        ]
        say_cells(axes, np.arange(columns + 1) - 0.5, np.arange(lines + 1) - 0.5, np.array(words))
        return image

    figure, image = _maps(runs, draw, 2.5, 2.1)
    figure.supxlabel("query head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="AOP, mean over windows and positions", shrink=0.8)
    return figure


def drift(sections: dict[str, MeasuredSection]) -> Figure | None:
    """AOP by turn, re-compressed and grown, side by side."""
    if "multiturn" not in sections:
        return None
    runs = [run for run in sections["multiturn"].runs if run.method != "full"]
    policies = {
        "recompress": "cache brought back to its budget after every turn",
        "once": "compressed once, then left to grow",
    }
    figure, grid = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
    for axes, (policy, title) in zip(grid, policies.items(), strict=True):
        for run in runs:
            if run.choice["phase.drift.policy"] == policy:
                rows = run.rows[(run.rows["metric"] == "drift/aop") & run.rows["turn"].notna()]
                turns = rows.groupby("turn")["value"]
                values = [estimate(values.to_numpy()) for _, values in turns]
                _line(axes, run, list(turns.groups), values, "turn {:.0f}")
        axes.set(xlabel="turn", title=title, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("AOP (bands: 95 % over windows)")
    _outside(figure, grid[1])
    return figure


def kept_tokens(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Which stretches of a document are kept, by layer."""
    if "paper" not in sections:
        return None
    runs = [run for run in sections["paper"].runs if run.method in MAPPED]

    def draw(axes: Axes, run: FinishedRun):
        rows = run.rows[(run.rows["metric"] == "kept/share") & (run.rows["document"] == 0)]
        grid = rows.pivot(index="layer", columns="position", values="value")
        width = np.diff(grid.columns[:2])[0]
        extent = (0, grid.columns[-1] + width, -0.5, len(grid) - 0.5)
        axes.set(yticks=_few(len(grid)))
        _say_stretches(axes, run.title, grid, width)
        return axes.imshow(
            grid, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower", extent=extent, interpolation="nearest"
        )

    figure, image = _maps(runs, draw, 3.1, 1.7)
    figure.supxlabel("token of the prompt (first window)", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=figure.axes, label="share kept, mean over KV heads", shrink=0.8)
    return figure


STRETCHES = 16  # of a prompt that words are for: a rectangle for every 16 tokens would double the document's bytes


def _say_stretches(axes: Axes, title: str, grid: pd.DataFrame, width: float) -> None:
    """Words for the kept shares `[layers, positions]`, for some stretches of the prompt."""
    parts = np.array_split(np.arange(grid.shape[1]), min(STRETCHES, grid.shape[1]))
    edges = [float(grid.columns[part[0]]) for part in parts] + [float(grid.columns[-1] + width)]
    words = [
        [
            f"{title}, layer {layer:.0f}, tokens {low:.0f} to {high - 1:.0f}: {own.iloc[part].mean():.2f} kept"
            for part, low, high in zip(parts, edges, edges[1:], strict=False)
        ]
        for layer, own in grid.iterrows()
    ]
    say_cells(axes, edges, np.arange(len(grid) + 1) - 0.5, np.array(words))


def windows(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Differences to the latest tokens, window by window."""
    runs = recency.pruned(list(sections.values()))
    found = recency.comparisons(runs)
    if not found:
        return None
    methods = [one.method for one in sorted(found, key=lambda one: one.value.mean) if one.metric == found[0].metric]
    metrics = list(dict.fromkeys(one.metric for one in found))
    figure, grid = plt.subplots(
        1, len(metrics), figsize=(3.2 * len(metrics) + 1, 0.28 * len(methods) + 1.2), sharey=True, squeeze=False
    )
    for axes, metric in zip(grid[0], metrics, strict=True):
        for one in (one for one in found if one.metric == metric):
            line, style = methods.index(one.method), look(one.method)
            values = differences(runs[one.method].documents[metric], runs[recency.RECENCY].documents[metric])
            points = axes.scatter(values, np.full(len(values), line), s=9, alpha=0.5, lw=0.6, **style)
            say(points, [f"{one.title}, window {index}: {v:+.3f}" for index, v in enumerate(values)])
            (bar,) = axes.plot([one.value.low, one.value.high], [line - 0.3] * 2, color="#000000", lw=1.2)
            say(bar, f"{one.title}, mean of {one.windows} windows: {spread(one.value, '{:+.3f}')}")
        axes.axvline(0, color="#666666", lw=0.8)
        axes.set(xlabel=f"{recency.margins()[metric]['label']}, method - StreamingLLM")
        axes.set_xscale("symlog", linthresh=0.1)
    grid[0, 0].set_yticks(range(len(methods)), [runs[method].title for method in methods])
    return figure


DEPTHS = 5  # equal parts of the prompt
SHOWN_BUDGET = "512"


def recall_by_depth(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Share of needles that are found, by where in the prompt they are."""
    if "retrieval" not in sections:
        return None
    runs = [run for run in sections["retrieval"].runs if run.choice.get("budget.tokens", SHOWN_BUDGET) == SHOWN_BUDGET]
    if not runs:
        return None
    names = [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}" for i in range(DEPTHS)]
    ordered = sorted(runs, key=lambda run: -run.metrics["retrieval/recall"])
    grid = np.full((len(ordered), DEPTHS), np.nan)
    for line, run in enumerate(ordered):
        rows = run.rows[(run.rows["metric"] == "retrieval/recall") & run.rows["depth"].notna()]
        part = np.minimum((rows["depth"] * DEPTHS).astype(int), DEPTHS - 1)
        means = rows.groupby(part)["value"].mean()
        grid[line, means.index] = means
    figure, axes = plt.subplots(figsize=(6.0, 0.3 * len(ordered) + 1.2))
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    words = [
        [f"{run.title}, {name} % of the prompt: {v:.2f} found" for name, v in zip(names, grid[line], strict=True)]
        for line, run in enumerate(ordered)
    ]
    say_cells(axes, np.arange(DEPTHS + 1) - 0.5, np.arange(len(ordered) + 1) - 0.5, np.array(words))
    for (line, part), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(
                part, line, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=8
            )
    axes.set(
        xticks=range(DEPTHS), xticklabels=names, yticks=range(len(ordered)), yticklabels=[run.title for run in ordered],
        xlabel="place of the needle in the prompt, %",
        title=f"Needle recall by depth, {SHOWN_BUDGET} tokens kept",
    )  # fmt: skip
    for label, run in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(look(run.method)["color"])
    figure.colorbar(image, ax=axes, label="share found")
    return figure


def spectra(sections: dict[str, MeasuredSection]) -> Figure | None:
    """Power of keys over frequency: by layer in the full cache, and what is left of it by method."""
    if "paper" not in sections:
        return None
    runs = {run.method: run for run in sections["paper"].runs}

    def powers(run: FinishedRun, metric: str, by: list[str]) -> pd.Series:
        rows = run.rows[run.rows["metric"] == metric]
        return rows.groupby(by)["value"].mean()

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.4), sharey=True)
    any_run = next(iter(runs.values()))
    layers = powers(any_run, "spectrum/full", ["layer", "frequency"]).unstack(0)
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.95, layers.shape[1]))
    for shade, (layer, values) in zip(shades, layers.items(), strict=True):
        named = f"layer {layer:.0f}" if layer in _few(len(shades)) else None
        (line,) = left.loglog(values.index, values, color=shade, lw=1.4, label=named)
        say(line, f"full cache, layer {layer:.0f}")
    left.set(title="full cache, by layer", ylabel="power of keys before RoPE")
    left.legend(fontsize=7, ncols=2)
    full = powers(any_run, "spectrum/full", ["frequency"])
    right.loglog(full.index, full, color="#000000", lw=2, label="full cache")
    for method in (*MAPPED, "turboquant"):
        if method in runs:
            values = powers(runs[method], "spectrum/rebuilt", ["frequency"])
            style = look(method)
            (line,) = right.loglog(values.index, values, lw=1.2, ms=4, markevery=4, label=runs[method].title, **style)
            say(line, runs[method].title)
    right.set(title="rebuilt from what is kept, mean of layers")
    _outside(figure, right)
    for axes in (left, right):
        axes.set_xlabel("frequency, cycles a token")
    return figure


FIGURES: dict[str, tuple[Callable[[dict[str, MeasuredSection]], Figure | None], str, str]] = {
    "layers_and_heads": (layers_and_heads, "paper", "Attention output perturbation by layer and query head."),
    "windows": (
        windows, "paper",
        "Differences to keeping the latest tokens, one point a window, with the 95 % interval of their mean below; "
        "left of 0 the method is better. Axes are linear within 0.1 and logarithmic beyond.",
    ),
    "aop_against_kl": (
        aop_against_kl, "paper",
        "The error of attention beside that of prediction, one point a method that evicts, at the same budget; bars "
        "are 95 % over windows.",
    ),
    "kept_tokens": (
        kept_tokens, "paper",
        "Which tokens of the first window are kept, in stretches of 16, by layer; sinks and the recent window are "
        "kept by all.",
    ),
    "spectra": (
        spectra, "paper",
        "Power spectra of keys along the tokens; white noise of variance 1 has power 1. Evicted keys are interpolated "
        "between their kept neighbours, which takes power from high frequencies and brings it to low ones.",
    ),
    "frontier": (
        frontier, "budgets",
        "Prediction against bytes; down is better, bars and bands are 95 % over windows. Left: budgets of 128 tokens "
        "up in 16 bits, and the whole prompt in codes. Right: an eighth of the full cache's bytes, spent on few tokens "
        "in 16 bits or on more in codes.",
    ),
    "drift": (drift, "multiturn", "Attention output perturbation over turns of the true continuation."),
    "recall_by_depth": (recall_by_depth, "retrieval", "Needles found by their place in the prompt."),
    "rate_distortion": (
        rate_distortion, "codec",
        "KL of predictions against how much smaller than in 16 bits a cache is, live or at rest; bands are 95 % over "
        "windows.",
    ),
}  # fmt: skip
"""Name of every figure: the function that draws it, the section that it stands in, and its caption."""
