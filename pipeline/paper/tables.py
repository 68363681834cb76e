"""The tables of every section."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from pipeline.paper import published
from pipeline.paper.beside import PUBLISHED, beside
from pipeline.paper.finished import FinishedRun
from pipeline.paper.measured import MeasuredSection
from pipeline.paper.recency import RECENCY
from pipeline.paper.table import MISSING, Column, Table, cell, flat, grid, listing, number
from pipeline.phases.retrieval import LEAST_FULL_RECALL
from pipeline.statistics import estimate, gap_closed


def by_method(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Runs by their method."""
    return {run.method: run for run in runs}


METHOD = {"method": lambda run: run.title}


def _tokens(run: FinishedRun) -> str:
    return number(run.metrics.get("memory/tokens"), "{:.0f}")


def latest(runs: dict[str, FinishedRun]) -> Callable[[FinishedRun], FinishedRun | None]:
    """The reference of differences to the latest tokens."""
    return lambda run: None if run.method == "full" else runs.get(RECENCY)


def paper(section: MeasuredSection) -> list[Table]:
    runs = by_method(section.runs)
    further = [
        Column("mass/mean", "recovered mass"),
        Column("aop/projected_mean", "AOP after W_O"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - StreamingLLM's", "{:+.3f}", difference=True),
        Column("ppl/top1", "top-1"),
        Column("ppl/delta_nll_context", "loss, context", "{:+.3f}"),
    ]
    rebuilt = [
        Column("fidelity/key_error", "key error"),
        Column("fidelity/value_error", "value error"),
        Column("fidelity/key_spectrum", "spectrum"),
        Column("kept/depth", "mean place"),
        Column("kept/odd", "odd places"),
        Column("memory/mb_after_generation", "MB after 64"),
    ]
    rebuilt = [column for column in rebuilt if any(column.metric in run.metrics for run in section.runs)]
    odd = ", share of kept tokens at odd places" if any(c.metric == "kept/odd" for c in rebuilt) else ""
    return [
        *(beside(spec, runs) for spec in PUBLISHED),
        listing(
            "prediction", "What the published tables leave out: prediction", section.runs, METHOD, further,
            "Recovered mass is the share of the full run's attention that falls on kept tokens. KL(full || compressed) "
            "and top-1 agreement are over 255 tokens; the loss on context-dependent tokens counts those that 4 sinks "
            "and 64 recent tokens predict worse than the full cache by more than 0.5 nat.",
            latest(runs),
        ),
        listing(
            "reconstruction", "What the published tables leave out: reconstruction", section.runs, METHOD, rebuilt,
            "Relative errors of keys (before RoPE) and values rebuilt from the cache, distance of the keys' power "
            f"spectra (0 to 1), mean place of kept tokens (0 the prompt's first, 1 its last){odd}, MB after 64 "
            "generated tokens.",
        ),
    ]  # fmt: skip


SHAPES = {"full": "the full cache itself", "turboquant": "every token in packed codes"}


def speed(section: MeasuredSection) -> list[Table]:
    """Speed by the shape of the cache, beside the published speed-ups of the methods that leave it."""
    theirs = published.table("throughput")
    numbers, cells = [], []
    for run in section.runs:
        pruned = run.method not in SHAPES
        shape = f"{_tokens(run)} tokens in 16 bits" if pruned else SHAPES[run.method]
        methods = [m for m in theirs if m != "turboquant"] if pruned else [m for m in theirs if m == run.method]
        found = run.estimate("throughput/speedup")
        span = [run.metrics.get(f"throughput/speedup_{end}", np.nan) for end in ("least", "most")]
        others = sorted(theirs[m]["speedup"] for m in methods)
        printed = {
            "cache": shape,
            "speed-up": cell(found, "{:.2f}"),
            "least and most": " to ".join(number(end, "{:.2f}") for end in span),
            "tokens/s": number(run.metrics.get("throughput/tok_s"), "{:.1f}"),
            "published speed-up": " to ".join(dict.fromkeys(f"{v:.2f}" for v in (others[:1] + others[-1:]))) or MISSING,
            "published tokens/s": ", ".join(f"{theirs[m]['tok_s']:.1f}" for m in methods) or MISSING,
        }
        line = {"cache": shape, **flat("speedup", found), "least": span[0], "most": span[1], "run_id": run.run_id}
        numbers.append(line | {"tok_s": run.metrics.get("throughput/tok_s")})
        cells.append(printed)
    note = (
        "Decoding against the full cache: medians of pairs that alternate in which cache goes first, means over "
        f"{section.counts} windows with 95 % intervals, and the mean of the windows' extreme pairs. Methods that keep "
        "the same number of tokens leave caches of one shape and one speed; WaveletKV stands for all of them, and what "
        "published speed-ups of one shape differ by is noise. The first row is the noise here. Speeds are of this "
        "machine and its load."
    )
    return [
        Table(
            "published_throughput", "Decoding speed by the shape of the cache", pd.DataFrame(numbers),
            pd.DataFrame(cells), note,
        )
    ]  # fmt: skip


def seeds(section: MeasuredSection) -> list[Table]:
    """What is random: means over windows by seed, and their spread beside that over windows."""
    numbers, cells = [], []
    for method in dict.fromkeys(run.method for run in section.runs):
        own = [run for run in section.runs if run.method == method]
        for metric, label in (("aop/mean", "AOP"), ("ppl/nd", "ND-PPL"), ("ppl/kl", "KL, nats")):
            means = [run.estimate(metric).mean for run in own]
            whole = estimate(pd.concat([run.documents[metric] for run in own], axis=1).mean(axis=1).to_numpy())
            line = {"method": own[0].title, "metric": metric, **flat("mean", whole), "seeds": len(own)}
            line |= {"least": min(means), "most": max(means)}
            numbers.append(line | {"run_id": " ".join(run.run_id for run in own)})
            cells.append(
                {
                    "method": own[0].title,
                    "metric": label,
                    f"mean of {len(own)} seeds": cell(whole, "{:.4f}"),
                    "least seed": f"{min(means):.4f}",
                    "greatest seed": f"{max(means):.4f}",
                }
            )
    note = (
        "Intervals are over windows, of each window's mean over the seeds; least and greatest are means over windows "
        "of one seed. All other tables use seed 0."
    )
    return [Table("seeds", "What chance does", pd.DataFrame(numbers), pd.DataFrame(cells), note)]


def recent(section: MeasuredSection) -> list[Table]:
    """The default recent window beside each method at its best."""
    tables = []
    for metric, label in (("aop/mean", "AOP"), ("ppl/kl", "KL, nats")):
        table = grid(
            f"recent_{metric.replace('/', '_')}", f"{label} by the number of latest tokens that are always kept",
            section.runs, "budget.recent", metric, "{:.3f}",
            "Columns are latest tokens that are kept whatever the scorer says, of a budget of 512; 64 is the default.",
        )  # fmt: skip
        tables.append(table)
    return tables


def baselines(section: MeasuredSection) -> list[Table]:
    runs = by_method(section.runs)
    methods = [run for run in section.runs if not run.method.startswith("oracle")]
    ranked = sorted(methods, key=lambda run: run.metrics["ppl/kl"])
    ordered = [*ranked, *(run for run in section.runs if run.method.startswith("oracle"))]
    columns = [
        Column("aop/mean", "AOP"),
        Column("mass/mean", "recovered mass"),
        Column("ppl/nd", "ND-PPL"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/top1", "top-1"),
    ]
    note = "Lowest KL first; the oracles look at the continuation, and are bounds, not methods."
    table = listing("baselines", "Methods, controls and oracles", ordered, METHOD, columns, note)
    differing = [
        Column("aop/mean", "AOP", "{:+.3f}", difference=True),
        Column("ppl/nd", "ND-PPL", "{:+.3f}", difference=True),
        Column("ppl/kl", "KL, nats", "{:+.3f}", difference=True),
    ]
    paired = "Paired differences, below 0 where the method is better."
    chance = listing(
        "minus_random",
        "Differences to random tokens",
        ordered,
        METHOD,
        differing,
        paired,
        lambda run: runs.get("random"),
    )
    return [table, chance, gaps(ordered, runs)] if {"random", "oracle_value"} <= set(runs) else [table]


def gaps(ordered: list[FinishedRun], runs: dict[str, FinishedRun]) -> Table:
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
        behind = [run, runs["random"], runs["oracle_value"]]
        numbers.append(line | {"run_id": " ".join(one.run_id for one in behind)})
        cells.append(printed)
    note = "(random - method) / (random - oracle): 0 is as good as random tokens, 1 as the oracle of mass and value."
    title = "Share of the gap between random tokens and the oracle that is closed"
    return Table("gap_closed", title, pd.DataFrame(numbers), pd.DataFrame(cells), note)


def budgets(section: MeasuredSection) -> list[Table]:
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


def equal_bytes(section: MeasuredSection) -> list[Table]:
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


def ablation(section: MeasuredSection) -> list[Table]:
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
        note = "Differences to the default on the same windows, paired: below 0, the change helps."
        tables.append(listing(f"ablation_{method}", title, runs, heads, columns, note, lambda run, o=own: o))
    return tables


def multiturn(section: MeasuredSection) -> list[Table]:
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


def correlation(section: MeasuredSection) -> list[Table]:
    columns = [
        Column(f"correlation/{name}", label, "{:+.2f}")
        for name, label in (("recency", "with recency"), ("knorm", "with Knorm"), ("keydiff", "with KeyDiff"))
    ]
    runs = [run for run in section.runs if run.method != "full"]
    runs.sort(key=lambda run: -run.metrics["correlation/recency"])
    note = (
        "Spearman's rank correlation between the scores of a method and those of something simpler, over the tokens "
        "that may be evicted, means over layers and KV heads: 1 the same order, 0 none in common."
    )
    return [listing("correlation", "What a score resembles", runs, METHOD, columns, note)]


def retrieval(section: MeasuredSection) -> list[Table]:
    full = cell(section.runs[0].estimate("retrieval/full_recall"), "{:.2f}")
    note = (
        "Share of planted facts that are answered, the question hidden at compression; columns are kept tokens. The "
        f"full cache: {full}. TurboQuant and the full cache keep every token at any budget. Intervals are the wider of "
        "Wilson's over questions and the bootstrap's over windows."
    )
    title = "Needle recall over budgets"
    return [grid("retrieval", title, section.runs, "budget.tokens", "retrieval/recall", "{:.2f}", note)]


CODES = {
    "spectral": "transform coder",
    "spectral_at_rest": "transform coder at rest",
    "pair_bits": "bits by RoPE pair",
    "turboquant_4bit": "TurboQuant, 4 bit",
    "turboquant_3bit": "TurboQuant, 3 bit",
    "turboquant_2bit": "TurboQuant, 2 bit",
    "dense": "16 bits",
}
NEAR = 1.1  # ratios within a tenth of one another are called equal bytes


def smaller(run: FinishedRun) -> float:
    """How many times smaller than the full cache in 16 bits what is kept of it is, live or at rest."""
    return run.metrics.get("memory/at_rest_ratio", run.metrics["memory/ratio"])


def coded(run: FinishedRun) -> str:
    """What a cache is held in."""
    return CODES.get(run.choice["storage"], run.choice["storage"])


def rival(run: FinishedRun, runs: list[FinishedRun]) -> FinishedRun | None:
    """What predicts best among all that is no transform coder and has the bytes of a run."""
    if not run.choice["storage"].startswith("spectral"):
        return None
    near = [
        other
        for other in runs
        if not other.choice["storage"].startswith("spectral") and 1 / NEAR < smaller(other) / smaller(run) < NEAR
    ]
    return min(near, key=lambda other: other.metrics["ppl/kl"], default=None)


def codec(section: MeasuredSection) -> list[Table]:
    runs = sorted(section.runs, key=smaller)
    heads = {**METHOD, "held in": coded, "full / cache": lambda run: number(smaller(run), "{:.2f}")}
    columns = [
        Column("ppl/kl", "KL, nats", "{:.4f}"),
        Column("ppl/kl", "KL - best rival's", "{:+.4f}", difference=True),
        Column("ppl/nd", "ND-PPL", "{:+.3f}"),
        Column("aop/mean", "AOP"),
        Column("memory/bases_mb", "bases, MB", "{:.1f}"),
    ]
    note = (
        "Full / cache: bytes of the full cache in 16 bits over those of what is kept, exact tokens included; "
        "at rest over those of the file, which is read before it is used. Differences, paired, are to the best of all "
        "that is no transform coder and has these bytes within a tenth. Bases are constants of the model."
    )
    columns = [column for column in columns if any(column.metric in run.metrics for run in section.runs)]
    return [
        listing(
            "codec", "Every token in codes, beside its rivals", runs, heads, columns, note, lambda run: rival(run, runs)
        )
    ]


def rivals(section: MeasuredSection) -> list[Table]:
    """Every method with every allocation, beside the latest tokens and beside its own uniform budget."""
    uniform = {run.method: run for run in section.runs if run.choice["budget.allocation"] == "uniform"}
    heads = {**METHOD, "allocation": lambda run: run.choice["budget.allocation"]}
    columns = [
        Column("aop/mean", "AOP"),
        Column("ppl/nd", "ND-PPL", "{:+.3f}"),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - StreamingLLM's", "{:+.3f}", difference=True),
        Column("kept/gone_everywhere", "gone", "{:.2f}"),
        Column("time/compress_s", "s"),
    ]
    runs = sorted(section.runs, key=lambda run: run.metrics["ppl/kl"])
    note = (
        "The same bytes in all rows. Gone: share of the prompt's tokens that no layer and no head keeps. Seconds of "
        "compression, KVzip's second pass over the prompt among them. Differences to StreamingLLM's uniform budget are "
        "paired; no method has seen a question."
    )
    own = [
        Column("aop/mean", "AOP - uniform", "{:+.3f}", difference=True),
        Column("ppl/kl", "KL - uniform", "{:+.3f}", difference=True),
    ]
    shared = [run for run in runs if run.choice["budget.allocation"] != "uniform"]
    tables = [listing("rivals", "Methods and allocations", runs, heads, columns, note, _recent(runs))]
    if shared:
        paired = "Paired differences to the same method with a uniform budget: below 0, the allocation helps."
        title = "What an allocation changes"
        shared.sort(key=lambda run: (run.method, run.choice["budget.allocation"]))
        tables.append(listing("allocations", title, shared, heads, own, paired, lambda run: uniform.get(run.method)))
    return tables


def _recent(runs: list[FinishedRun]) -> Callable[[FinishedRun], FinishedRun | None]:
    """The reference of differences to the latest tokens, which are the same with every allocation."""
    uniform = (run for run in runs if (run.method, run.choice["budget.allocation"]) == (RECENCY, "uniform"))
    recent = next(uniform, None)
    return lambda run: None if run.method == RECENCY else recent


def rivals_retrieval(section: MeasuredSection) -> list[Table]:
    """What every method finds with every allocation, one table a task that the full cache can do."""
    heads = {**METHOD, "allocation": lambda run: run.choice["budget.allocation"]}
    columns = [
        Column("retrieval/recall", "recall", "{:.2f}"),
        Column("retrieval/recall", "recall - StreamingLLM's", "{:+.2f}", difference=True),
        Column("retrieval/kept", "kept", "{:.2f}"),
        Column("retrieval/gone_everywhere", "gone", "{:.2f}"),
    ]
    tables, beyond = [], []
    for task in dict.fromkeys(run.choice["document.task"] for run in section.runs):
        runs = [run for run in section.runs if run.choice["document.task"] == task]
        full = runs[0].estimate("retrieval/full_recall")
        if full.mean < LEAST_FULL_RECALL:
            beyond.append(f"{task} ({full.mean:.2f})")
            continue
        reference = _recent(runs)
        runs.sort(key=lambda run: -run.metrics["retrieval/recall"])
        note = (
            f"The full cache finds {cell(full, '{:.2f}')}. The same bytes in all rows, the question hidden at "
            "compression. Kept, gone: of the sentences that hold an answer the share that a layer and head keeps on "
            "average, and that none of them keeps. Differences to StreamingLLM's uniform budget, paired."
        )
        title = f"What is still found: {task}"
        tables.append(listing(f"rivals_{task}", title, runs, heads, columns, note, reference))
    if beyond:
        left_out = f" Left out, as the full cache finds fewer than {LEAST_FULL_RECALL}: {', '.join(beyond)}."
        tables[-1] = replace(tables[-1], note=tables[-1].note + left_out)
    return tables


def refit(section: MeasuredSection) -> list[Table]:
    """Every selection with what its tokens are given, beside nothing."""
    plain = {run.method: run for run in section.runs if run.choice["refit"] == "none"}
    heads = {**METHOD, "refit": lambda run: run.choice["refit"]}
    columns = [
        Column("memory/mb", "MB", "{:.3f}"),
        Column("aop/mean", "AOP"),
        Column("aop/mean", "AOP - none", "{:+.3f}", difference=True),
        Column("ppl/kl", "KL, nats"),
        Column("ppl/kl", "KL - none", "{:+.3f}", difference=True),
        Column("time/compress_s", "s"),
    ]
    note = (
        "A bias takes four bytes a token, layer and KV head. Fitted to the prompt's last queries, turned on to the "
        "positions after it; AOP is that of queries to come, which it has not seen. Differences to the same selection "
        "without a refit, paired."
    )
    title = "Kept tokens refitted"
    return [listing("refit", title, section.runs, heads, columns, note, lambda run: plain.get(run.method))]


BACKGROUNDS = (
    "tone",
    "chirp",
    "bursts",
    "drift",
)  # of layers 0, 1, 2, 3, and so on from the tone: conf/model/synthetic


def synthetic(section: MeasuredSection) -> list[Table]:
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


TABLES: dict[str, Callable[[MeasuredSection], list[Table]]] = {
    "paper": paper, "speed": speed, "baselines": baselines, "seeds": seeds, "rivals": rivals,
    "rivals_retrieval": rivals_retrieval, "refit": refit, "budgets": budgets, "equal_bytes": equal_bytes,
    "ablation": ablation, "recent": recent, "multiturn": multiturn, "correlation": correlation, "retrieval": retrieval,
    "codec": codec, "synthetic": synthetic,
}  # fmt: skip
