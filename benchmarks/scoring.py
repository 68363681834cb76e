"""Scoring, selection and compaction of all layers beside the prefill.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --tokens 4096,32768,131072 --methods fourier,wavelet --csv scoring.csv

A model with random weights is prefilled; noise as large as its keys is added to them, which random weights make nearly
periodic. `one pass` is how the library compresses here; `layers` scores a layer at a time, the reference in float32 by
the array code; `same tokens` is the share of kept tokens that agree with it. Milliseconds by the host's clock, in
percent of the prefill.
"""

import argparse
import gc

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.clock import Row, card, device, quartiles, report, wall_milliseconds
from spectral_kv.backends.base import Prefill
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.engine.together import scores
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tova import Tova
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.dense import Dense

METHODS = {
    "fourier": Fourier(), "wavelet": Wavelet(), "wavelet_fourier": WaveletFourier(), "knorm": Knorm(),
    "keydiff": KeyDiff(), "snapkv": SnapKV(), "tova": Tova(), "streaming": Streaming(),
    "expected_attention": ExpectedAttention(),
}  # fmt: skip


def noisy(prefill: Prefill) -> None:
    """Noise on keys, so that rankings are decided by the signal and not by the last bit."""
    generator = torch.Generator(prefill.keys[0].device).manual_seed(1)
    for keys in prefill.keys:
        noise = torch.randn(keys.shape, generator=generator, device=keys.device)
        keys += (noise * keys.float().std()).to(keys.dtype)


def measured(backend: TorchBackend, tokens: int, methods: list[str], kept: int, window: int) -> list[Row]:
    ids = np.random.default_rng(0).integers(0, backend.shape.vocabulary, size=tokens)
    few = 5 if tokens < 100_000 else 3
    prefill_ms = quartiles(wall_milliseconds(lambda: backend.prefill(ids, window), few, 1))[0]
    prefill = backend.prefill(ids, window)
    noisy(prefill)
    budget, positions = Budget(kept), np.arange(tokens)

    def views(scorer: object) -> list[LayerView]:
        queries = prefill.queries
        if getattr(scorer, "window", None) is not None:
            queries = [q[:, q.shape[1] - min(scorer.window, q.shape[1]) :] for q in queries]
        contents = enumerate(zip(prefill.keys, prefill.values, queries, strict=True))
        return [
            LayerView(
                k, v, backend.rope, positions, budget.evictable(tokens), scaling=backend.scaling, index=i, queries=q
            )
            for i, (k, v, q) in contents
        ]

    rows = []
    for method in methods:
        scorer = METHODS[method]

        def scored(scorer=scorer) -> list:
            return scores(scorer, views(scorer))

        def chosen(scored=scored) -> list:
            return select_layers(scored(), budget)

        def compressed(chosen=chosen) -> object:
            return backend.compress(prefill, chosen(), Dense())

        def layers(scorer=scorer) -> list:
            return select_layers([scorer.score(v) for v in views(scorer)], budget)

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        compressed()
        peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
        ms, low, high = quartiles(wall_milliseconds(compressed, 9, 2))
        parts = [quartiles(wall_milliseconds(part, 5, 1))[0] for part in (scored, chosen)]
        alone = quartiles(wall_milliseconds(layers, 3, 1))[0]
        pairs = zip(torch.stack(chosen()).flatten(0, 1), torch.stack(layers()).flatten(0, 1), strict=True)
        same = np.mean([np.intersect1d(a.cpu().numpy(), b.cpu().numpy()).size / kept for a, b in pairs])
        keys = sum(k.nbytes for k in prefill.keys)
        rows.append(
            {"tokens": tokens, "method": method, "prefill ms": prefill_ms, "ms": ms, "low": low, "high": high,
             "% of prefill": 100 * ms / prefill_ms, "scores ms": parts[0], "scores + selection ms": parts[1],
             "a layer at a time ms": alone, "same tokens": float(same), "peak / keys": peak and peak / keys}
        )  # fmt: skip
        gc.collect()
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b" if gpu else "tiny", choices=shapes.SHAPES)
    parser.add_argument("--tokens", default="4096,32768" if gpu else "1024")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--kept", type=int, default=512)
    parser.add_argument("--csv")
    options = parser.parse_args()
    methods = options.methods.split(",")
    print(f"{card()}, torch {torch.__version__}")
    backend = TorchBackend.wrap(shapes.model(options.shape, device()))
    rows: list[Row] = []
    for tokens in map(int, options.tokens.split(",")):
        rows += measured(backend, tokens, methods, options.kept, 64 if "expected_attention" not in methods else tokens)
    for row in rows:
        row |= {"shape": options.shape, "card": card()}
    report("scoring", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
