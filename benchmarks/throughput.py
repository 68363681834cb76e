"""What `phase=throughput` measures, of models of published shapes with random weights.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --sizes 32768x16 --methods wavelet --storages dense,turboquant_4bit --csv out.csv

Full and compressed cache take turns, by steps of the engine and by eager forward passes; every row is one document.
`speedup` is of the engine's steps, `eager_speedup` of forward passes.
"""

import argparse
import gc

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.clock import Row, card, device, report
from pipeline.phases.base import Context
from pipeline.phases.throughput import Throughput
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
from spectral_kv import names
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.compressor import Compressor, SharedScores, observed
from spectral_kv.selection import Budget


def measured(backend: TorchBackend, tokens: int, phase: Throughput, method: str, storage: str, kept: int) -> list[Row]:
    scorer, rows = names.method(method), []
    compressor = Compressor(backend, scorer, Budget(kept) if scorer else None, names.storage(storage))
    for document in range(phase.documents):
        ids = np.random.default_rng(document).integers(0, backend.shape.vocabulary, size=tokens + 1)
        full = FullRun(backend, ids, tokens, observed(scorer, tokens))
        compressed = compress(compressor, full, SharedScores(), document)
        found = phase.measure(Context(backend, full, compressed, compressor, document, []))
        row = {"tokens": tokens, "batch": phase.batch, "method": method, "storage": storage, "document": document}
        rows.append(row | {each["metric"].removeprefix("throughput/"): each["value"] for each in found})
        del full, compressed
        gc.collect()
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b" if gpu else "tiny", choices=shapes.SHAPES)
    parser.add_argument("--sizes", default="4096x1,32768x16" if gpu else "512x1", help="tokens x batch, ...")
    parser.add_argument("--methods", default="wavelet,full")
    parser.add_argument("--storages", default="dense,turboquant_4bit")
    parser.add_argument("--kept", type=int, default=512 if gpu else 128)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a turn")
    parser.add_argument("--repeats", type=int, default=4, help="pairs a document")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--csv")
    options = parser.parse_args()
    print(f"{card()}, torch {torch.__version__}")
    model = shapes.model(options.shape, device(), torch.bfloat16 if gpu else torch.float32)
    backend = TorchBackend.wrap(model, cache_dtype="bfloat16")
    rows: list[Row] = []
    for size in options.sizes.split(","):
        tokens, batch = map(int, size.split("x"))
        phase = Throughput(options.tokens, options.repeats, batch=batch, documents=options.documents)
        for method in options.methods.split(","):
            for storage in options.storages.split(","):
                rows += measured(backend, tokens, phase, method, storage, options.kept)
                print(rows[-1], flush=True)
                backend.engine.release()
                gc.collect()
    for row in rows:
        row |= {"shape": options.shape, "card": card()}
    report("throughput", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
