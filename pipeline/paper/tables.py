"""The tables of every section."""

from collections.abc import Callable

import pandas as pd

from pipeline.paper.beside import PUBLISHED, beside
from pipeline.paper.measured import Measured
from pipeline.paper.runs import Run
from pipeline.paper.table import Column, Table, cell, flat, grid, listing, number
from pipeline.statistics import estimate, gap_closed


def by_method(runs: list[Run]) -> dict[str, Run]:
    """Runs by their method."""
    return {run.method: run for run in runs}


METHOD = {"method": lambda run: run.title}


def _tokens(run: Run) -> str:
    return number(run.metrics.get("memory/tokens"), "{:.0f}")


def paper(section: Measured) -> list[Table]:
    runs = by_method(section.runs)
    further = [
        Column("mass/mean", "recovered mass"),
        Column("aop/projected_mean", "AOP after W_O"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/top1", "top-1"),
        Column("ppl/delta_nll_context", "loss, context", "{:+.3f}"),
    ]
    rebuilt = [
        Column("fidelity/key_error", "key error"),
        Column("fidelity/value_error", "value error"),
        Column("fidelity/key_spectrum", "spectrum"),
        Column("kept/depth", "mean place"),
        Column("memory/mb_after_generation", "MB after 64"),
        Column("match/prefix", "prefix", "{:.0f}"),
    ]
    return [
        *(beside(spec, runs) for spec in PUBLISHED),
        listing(
            "prediction", "What the published tables leave out: prediction", section.runs, METHOD, further,
            "Recovered mass is the share of the full run's attention that falls on kept tokens. KL(full || compressed) "
            "and top-1 agreement are over 255 tokens; the loss on context-dependent tokens counts those that 4 sinks "
            "and 64 recent tokens predict worse than the full cache by more than 0.5 nat.",
        ),
        listing(
            "reconstruction", "What the published tables leave out: reconstruction", section.runs, METHOD, rebuilt,
            "Relative errors of keys (before RoPE) and values rebuilt from the cache, distance of the keys' power "
            "spectra (0 to 1), mean place of kept tokens (0 the prompt's first, 1 its last), MB after 64 generated "
            "tokens, and tokens decoded before the first that differs from the full cache's (one document).",
        ),
    ]  # fmt: skip


def baselines(section: Measured) -> list[Table]:
    runs = by_method(section.runs)
    methods = [run for run in section.runs if not run.method.startswith("oracle")]
    ranked = sorted(methods, key=lambda run: run.metrics["ppl/kl"])
    ordered = [*ranked, *(run for run in section.runs if run.method.startswith("oracle"))]
    columns = [
        Column("aop/mean", "AOP"),
        Column("mass/mean", "recovered mass"),
        Column("ppl/nd", "ND-PPL"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - random's", "{:+.3f}", difference=True),
        Column("ppl/top1", "top-1"),
    ]
    note = "Lowest KL first; the oracles look at the continuation, and are bounds, not methods. Differences are paired."
    table = listing(
        "baselines", "Methods, controls and oracles", ordered, METHOD, columns, note, lambda run: runs["random"]
    )
    return [table, gaps(ordered, runs)]


def gaps(ordered: list[Run], runs: dict[str, Run]) -> Table:
    """Share of the way from random tokens to the oracle that a method goes."""
    metrics = {"aop/mean": "AOP", "ppl/delta_nll": "loss", "ppl/kl": "KL"}
    numbers, cells = [], []
    for run in ordered:
        line: dict[str, object] = {"method": run.title}
        printed = dict(line)
        for metric, label in metrics.items():
            ends = (runs[m].documents[metric].to_numpy() for m in ("random", "oracle_value"))
            value = gap_closed(run.documents[metric].to_numpy(), *ends)
            line |= flat(f"{metric}_gap", value)
            printed[label] = cell(value, "{:.2f}")
        numbers.append(line | {"run_id": run.run_id})
        cells.append(printed)
    note = "(random - method) / (random - oracle): 0 is as good as random tokens, 1 as the oracle of mass and value."
    title = "Share of the gap between random tokens and the oracle that is closed"
    return Table("gap_closed", title, pd.DataFrame(numbers), pd.DataFrame(cells), note)


def budgets(section: Measured) -> list[Table]:
    metrics = {
        "aop/mean": ("AOP", "{:.3f}"),
        "ppl/kl": ("KL(full || compressed) in nats", "{:.3f}"),
        "ppl/nd": ("ND-PPL", "{:+.3f}"),
    }
    return [
        grid(
            f"budgets_{metric.replace('/', '_')}", f"{label} over budgets", section.runs, "budget.tokens", metric,
            pattern, "Columns are kept tokens of the prompt, in every layer and KV head.",
        )
        for metric, (label, pattern) in metrics.items()
    ]  # fmt: skip


def equal_bytes(section: Measured) -> list[Table]:
    dense = {run.method: run for run in section.runs if run.choice["storage"] == "dense"}
    heads = {**METHOD, "storage": lambda run: run.choice["storage"], "tokens": _tokens}
    columns = [
        Column("memory/mb", "MB", "{:.2f}"),
        Column("aop/mean", "AOP"),
        Column("ppl/nd", "ND-PPL", "{:+.3f}"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - dense's", "{:+.3f}", difference=True),
        Column("ppl/top1", "top-1"),
    ]
    note = (
        "All rows but those of the full cache have the bytes of an eighth of it. Differences are to the same method in "
        "16 bits, paired."
    )
    runs = sorted(section.runs, key=lambda run: (run.method == "full", run.metrics["ppl/kl"]))
    title = "Selection and storage at the same bytes"
    return [listing("equal_bytes", title, runs, heads, columns, note, lambda run: dense[run.method])]


def ablation(section: Measured) -> list[Table]:
    default = {run.method: run for run in section.runs if run.choice["variant"].endswith("_default")}
    columns = [
        Column("aop/mean", "AOP"),
        Column("aop/mean", "AOP - default's", "{:+.3f}", difference=True),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - default's", "{:+.3f}", difference=True),
    ]
    tables = []
    for method, own in default.items():
        runs = [run for run in section.runs if run.method == method]
        heads = {"variant": lambda run, m=method: run.choice["variant"].removeprefix(f"{m}_").replace("_", " ")}
        title = f"{own.title}, one switch changed"
        note = "Differences to the default on the same documents, paired: below 0, the change helps."
        tables.append(listing(f"ablation_{method}", title, runs, heads, columns, note, lambda run, o=own: o))
    return tables


def multiturn(section: Measured) -> list[Table]:
    heads = {**METHOD, "policy": lambda run: run.choice["phase.drift.policy"]}
    columns = [
        Column("drift/aop_first", "AOP, turn 1"),
        Column("drift/aop_last", "AOP, turn 5"),
        Column("drift/aop_slope", "AOP a turn", "{:+.4f}"),
        Column("drift/delta_nll_last", "loss, turn 5", "{:+.3f}"),
        Column("drift/delta_nll_slope", "loss a turn", "{:+.4f}"),
    ]
    note = (
        "recompress: back to the budget after every turn; once: the cache grows. Slopes are least-squares lines "
        "through five turns, the loss is the rise in nats over the full cache's."
    )
    return [listing("multiturn", "Drift over five turns", section.runs, heads, columns, note)]


def retrieval(section: Measured) -> list[Table]:
    full = cell(section.runs[0].estimate("retrieval/full_recall"), "{:.2f}")
    note = (
        "Share of planted facts that are answered, the question hidden at compression; columns are kept tokens. The "
        f"full cache: {full}. TurboQuant and the full cache keep every token at any budget."
    )
    title = "Needle recall over budgets"
    return [grid("retrieval", title, section.runs, "budget.tokens", "retrieval/recall", "{:.2f}", note)]


BACKGROUNDS = (
    "tone",
    "chirp",
    "bursts",
    "drift",
)  # of layers 0, 1, 2, 3, and so on from the tone: conf/model/synthetic


def synthetic(section: Measured) -> list[Table]:
    numbers, cells = [], []
    for run in section.runs:
        rows = run.rows[(run.rows["metric"] == "planted/recall") & run.rows["layer"].notna()]
        line: dict[str, object] = {"method": run.title}
        printed = dict(line)
        for index, background in enumerate(BACKGROUNDS):
            own = rows[rows["layer"] % len(BACKGROUNDS) == index].groupby("document")["value"].mean()
            value = estimate(own.to_numpy()) if len(own) else None
            line |= flat(background, value)
            printed[background] = cell(value, "{:.2f}")
        for metric, label, pattern in (("planted/recall", "all", "{:.2f}"), ("aop/mean", "AOP", "{:.3f}")):
            line |= flat(metric, run.estimate(metric))
            printed[label] = cell(run.estimate(metric), pattern)
        numbers.append(line | {"run_id": run.run_id})
        cells.append(printed)
    note = "Share of planted tokens that are kept, by the background that they stand out from; keys without a model."
    return [Table("synthetic", "Planted tokens that are kept", pd.DataFrame(numbers), pd.DataFrame(cells), note)]


TABLES: dict[str, Callable[[Measured], list[Table]]] = {
    "paper": paper, "baselines": baselines, "budgets": budgets, "equal_bytes": equal_bytes, "ablation": ablation,
    "multiturn": multiturn, "retrieval": retrieval, "synthetic": synthetic,
}  # fmt: skip
