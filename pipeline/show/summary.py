"""What a run prints at its end: one screen."""

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.phases.retrieval import LEAST_FULL_RECALL
from pipeline.run import Result
from pipeline.statistics import Estimate

LABELS = {
    "memory/mb": ("Cache, MB", "{:.2f}"),
    "memory/mb_after_generation": ("Cache after generating, MB", "{:.2f}"),
    "memory/bases_mb": ("Bases of the model beside it, MB", "{:.2f}"),
    "memory/ratio": ("Full cache / cache", "{:.2f}x"),
    "memory/tokens": ("Tokens kept", "{:.0f}"),
    "audit/evicted_tokens": ("Evicted, over layers and KV heads", "{:.0f}"),
    "audit/freed_mb": ("Freed, MB", "{:.2f}"),
    "audit/prefill_peak_mb": ("Most allocated while the prompt ran, MB", "{:.1f}"),
    "kept/gone_everywhere": ("Tokens that no layer and head keeps", "{:.1%}"),
    "time/repetition_s": ("Feeding the prompt again, s", "{:.2f}"),
    "time/repetition_prefills": ("... in prefills", "{:.1f}"),
    "aop/mean": ("AOP, mean", "{:.3f}"),
    "aop/p95": ("AOP, 95th percentile", "{:.3f}"),
    "aop/max": ("AOP, largest", "{:.2f}"),
    "aop/projected_mean": ("AOP after W_O, mean", "{:.3f}"),
    "mass/mean": ("Recovered attention mass, mean", "{:.3f}"),
    "planted/recall": ("Planted tokens kept", "{:.3f}"),
    "ppl/full": ("Perplexity, full cache", "{:.2f}"),
    "ppl/comp": ("Perplexity, compressed", "{:.2f}"),
    "ppl/nd": ("ND-PPL, relative rise", "{:+.3f}"),
    "ppl/delta_nll": ("Rise of the loss, nats", "{:+.3f}"),
    "ppl/delta_nll_context": ("... on context-dependent tokens", "{:+.3f}"),
    "ppl/kl": ("KL(full || compressed), nats", "{:.3f}"),
    "ppl/top1": ("Top-1 agreement", "{:.3f}"),
    "drift/aop_first": ("Drift: AOP, first turn", "{:.3f}"),
    "drift/aop_last": ("Drift: AOP, last turn", "{:.3f}"),
    "drift/aop_slope": ("Drift: AOP a turn", "{:+.4f}"),
    "drift/delta_nll_slope": ("Drift: loss in nats a turn", "{:+.4f}"),
    "fidelity/key_error": ("Error of reconstructed keys", "{:.3f}"),
    "fidelity/value_error": ("Error of reconstructed values", "{:.3f}"),
    "fidelity/key_spectrum": ("Distance between key spectra", "{:.3f}"),
    "retrieval/recall": ("Lookups answered", "{:.0%}"),
    "retrieval/full_recall": ("... by the full cache", "{:.0%}"),
    "retrieval/answerable": ("... of those it answers", "{:.0%}"),
    "throughput/tok_s": ("Decoding, tokens/s", "{:.1f}"),
    "throughput/full_tok_s": ("Decoding on the full cache, tokens/s", "{:.1f}"),
    "throughput/speedup": ("Speed-up over the full cache", "{:.2f}x"),
    "decoding/kl_first": ("While decoding: KL, first stretch", "{:.3f}"),
    "decoding/kl_last": ("... last stretch", "{:.3f}"),
    "decoding/aop_first": ("While decoding: AOP, first stretch", "{:.3f}"),
    "decoding/aop_last": ("... last stretch", "{:.3f}"),
    "decoding/most_tokens": ("Most tokens held while decoding", "{:.0f}"),
    "decoding/resident_mb": ("Cache at its largest, MB", "{:.2f}"),
    "decoding/full_mb": ("Full cache then, MB", "{:.2f}"),
    "decoding/tok_s": ("Decoding with evictions, tokens/s", "{:.1f}"),
    "decoding/full_tok_s": ("The same steps on the full cache, tokens/s", "{:.1f}"),
    "match/tokens": ("Decoded tokens equal to the full cache's", "{:.0%}"),
    "match/noise_floor_tokens": ("... of the full cache in another kernel", "{:.0%}"),
}


def spread(value: Estimate, pattern: str) -> str:
    """`mean [low, high]`, or the mean alone where documents do not differ or are too few."""
    mean = pattern.format(value.mean)
    if not value.low < value.high:
        return mean
    return f"{mean} [{pattern.format(value.low)}, {pattern.format(value.high)}]"


def described(metrics: dict[str, float]) -> str:
    """A Markdown table of the metrics that have a label; nothing where there is none."""
    lines = []
    for metric, (label, pattern) in LABELS.items():
        if metric in metrics:
            bounds = (metrics.get(f"{metric}_{bound}", np.nan) for bound in ("low", "high"))
            cells = label.replace("|", "\\|"), spread(Estimate(metrics[metric], *bounds), pattern)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| | mean over documents [95 % interval] |", "|---|---|", *lines, "\n"]) if lines else ""


def show(result: Result) -> None:
    """Print the metrics of a run with their 95 % intervals, its MLflow id and the command that opens the UI."""
    console = Console(highlight=False)
    budget = "all tokens" if result.budget is None else f"{result.budget} tokens"
    table = Table(
        title=", ".join(
            [result.title, budget, *result.further, result.storage, f"model {result.model} on {result.backend}"]
        ),
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    table.add_column("mean over documents [95 % interval]", justify="right")
    for metric, (label, pattern) in LABELS.items():
        if (value := result.estimate(metric)) is not None:
            table.add_row(label, spread(value, pattern))
    console.print(table)
    metrics = result.metrics
    if metrics.get("ppl/flagged", 0) > 0:
        share = metrics["ppl/flagged"]
        console.print(
            f"Warning: the full cache predicts {share:.0%} of the documents almost perfectly "
            "(perplexity under 1.5): they measure copying."
        )
    if (found := metrics.get("retrieval/full_recall", 1)) < LEAST_FULL_RECALL:
        console.print(
            f"Warning: the full cache itself finds only {found:.0%}: the task measures nothing on this model."
        )
    console.print(f"{result.documents}; the method reads {result.reads}")
    if result.reused:
        console.print("Measured before with the same code, model and documents; force=true measures again.")
        if "throughput/speedup" in metrics:
            console.print("Speeds are those of that time, when the machine may have been busier or less busy.")
    else:
        console.print(
            f"{metrics['time/total_s']:.1f} s; prefill {metrics['time/prefill_s']:.2f} s "
            f"and compression {metrics['time/compress_s']:.3f} s a document; "
            f"{metrics['prefill/computed']:.0f} prefills computed, {metrics['prefill/reused']:.0f} reused",
            soft_wrap=True,
        )
    if result.timing_note:
        console.print(f"Note: {result.timing_note}.")
    console.print(f"MLflow run {result.run_id}   mlflow ui --backend-store-uri {result.store}", soft_wrap=True)
