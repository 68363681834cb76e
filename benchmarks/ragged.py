"""Bytes that a GPU's allocator gives to ragged caches, beside those of the budget, and what a step of decoding takes.

    python -m benchmarks.ragged --csv docs/results/ragged_h100.csv
    python -m benchmarks.ragged --models smollm2 --budgets 512 method=snapkv

Further arguments are settings of `python -m pipeline`. A prompt is compressed with every allocation and budget;
`torch.cuda.memory_allocated` is asked before a cache is made and afterwards. `padded_mb` is what heads as long as the
longest would take. A step is one of 32 tokens that are decoded greedily.
"""

import argparse
import gc
import statistics
from dataclasses import replace

import torch

from benchmarks.clock import card, report, wall_milliseconds
from pipeline.job import prepare
from pipeline.run import loaded
from pipeline.settings.compose import composed
from spectral_kv.compressor import Compressor, observed
from spectral_kv.storage.dense import Dense

STEPS = 32


def measured(model: str, budgets: list[int], overrides: list[str]) -> list[dict]:
    """One row an allocation and budget."""
    own = ["method=defensive", "document.count=1", "document.continuation=257", *overrides]
    job = prepare(composed([f"model={model}", *own]))
    _, backend = loaded(job.settings, job.checkpoint)
    scorer, tokens = job.settings.method.scorer, job.settings.documents.tokens
    prefill = backend.prefill(job.windows[0][:tokens], observed(scorer, tokens), job.settings.backend.chunk)
    shape, rows = backend.shape, []
    heads = shape.layers * shape.kv_heads
    scores = Compressor(backend, scorer, job.budget, Dense()).scores(prefill, 0, prefill.queries)
    for allocation in ("uniform", "layer", "head", "global"):
        for budget in budgets:
            compressor = Compressor(backend, scorer, replace(job.budget, tokens=budget, allocation=allocation), Dense())
            kept = compressor.select(scores)
            lengths = [len(head) for layer in kept for head in layer]
            compressor.store(prefill, kept)  # builds what is cached once
            cache = None  # the one before
            gc.collect()
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
            cache = compressor.store(prefill, kept)
            given = None if before is None else (torch.cuda.memory_allocated() - before) / 1e6
            row = cache.nbytes / sum(lengths)
            took = wall_milliseconds(lambda cache=cache: backend.generate(cache.copy(), 5, STEPS), 5, 2)
            rows.append(
                {
                    "model": model, "method": job.settings.method.title, "allocation": allocation, "tokens": budget,
                    "of": tokens, "due_mb": heads * budget * row / 1e6, "counted_mb": cache.nbytes / 1e6,
                    "allocated_mb": given, "padded_mb": heads * max(lengths) * row / 1e6, "shortest": min(lengths),
                    "longest": max(lengths), "step_ms": statistics.median(took) / STEPS, "card": card(),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--models", default="reference,smollm2", help="options of conf/model")
    parser.add_argument("--budgets", default="256,512,1024,2048", help="tokens of every layer and KV head")
    parser.add_argument("--csv", help="where rows go")
    arguments = parser.parse_intermixed_args()
    budgets = [int(b) for b in arguments.budgets.split(",")]
    rows = [row for m in arguments.models.split(",") for row in measured(m, budgets, arguments.overrides)]
    report("ragged", rows, arguments.csv)


if __name__ == "__main__":
    main()
