"""Scoring, selection and compaction of all layers beside the prefill.

    python -m benchmarks.scoring
    python -m benchmarks.scoring --tokens 4096,32768,131072 --methods fourier,wavelet --csv scoring.csv

A model with random weights is prefilled; noise as large as its keys is added to them, which random weights make nearly
periodic. `ms` is how long the library takes to score, to select and to store, by the host's clock, also in percent of
the prefill, in turns with `scores first`, in two calls, for whoever wants the scores; `a layer at a time` scores so,
the reference in float32 by the array code; `same tokens` is the share of kept tokens that agree with it.
"""

import argparse
import gc

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.clock import Row, card, device, quartiles, report, wall_milliseconds
from spectral_kv.backends.base import Prefill
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.calibration import QueryStatistics
from spectral_kv.compressor import Compressor, observed
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tova import Tova
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select_layers
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import to_numpy

METHODS = {
    "fourier": Fourier(), "wavelet": Wavelet(), "wavelet_fourier": WaveletFourier(), "knorm": Knorm(),
    "keydiff": KeyDiff(), "snapkv": SnapKV(), "tova": Tova(), "streaming": Streaming(),
    "expected_attention": ExpectedAttention(), "tri": TriAttention(), "wavelet_tri": WaveletTri(),
}  # fmt: skip


def noisy(prefill: Prefill) -> None:
    """Noise on keys, so that rankings are decided by the signal and not by the last bit."""
    generator = torch.Generator(prefill.keys[0].device).manual_seed(1)
    for keys in prefill.keys:
        noise = torch.randn(keys.shape, generator=generator, device=keys.device)
        keys += (noise * keys.float().std()).to(keys.dtype)


def statistics(backend: TorchBackend) -> QueryStatistics:
    """What calibration might have found."""
    shape, rng = backend.shape, np.random.default_rng(2)
    mu = rng.normal(size=(shape.layers, shape.query_heads, shape.dim // 2, 2)) @ np.array([1, 1j])
    return QueryStatistics(mu, np.abs(mu) + rng.random(mu.shape))


def measured(backend: TorchBackend, tokens: int, methods: list[str], kept: int) -> list[Row]:
    ids = np.random.default_rng(0).integers(0, backend.shape.vocabulary, size=tokens)
    few = 5 if tokens < 100_000 else 3
    prefill_ms = quartiles(wall_milliseconds(lambda: backend.prefill(ids, 64), few, 1))[0]
    prefill = backend.prefill(ids, max(observed(METHODS[method], tokens) for method in methods))
    noisy(prefill)
    budget, positions, calibrated = Budget(kept), np.arange(tokens), statistics(backend)
    rows = []
    for method in methods:
        compressor = Compressor(backend, METHODS[method], budget, Dense(), calibrated)
        wanted = observed(compressor.scorer, tokens)
        queries = [q[:, q.shape[1] - wanted :] for q in prefill.queries] if wanted else None

        def scored(compressor=compressor, queries=queries) -> object:
            return compressor.scores(prefill, 0, queries)

        def chosen(compressor=compressor, queries=queries) -> object:
            return compressor.choose(prefill, 0, queries)

        def compressed(compressor=compressor, queries=queries) -> tuple:
            return compressor.compress(prefill, 0, queries)

        def apart(compressor=compressor, scored=scored) -> object:
            return compressor.select_and_store(prefill, scored())

        def layers(compressor=compressor, queries=queries) -> list:
            contents = enumerate(zip(prefill.keys, prefill.values, strict=True))
            views = (
                compressor.view(i, k, v, positions, budget.evictable(tokens), queries=queries[i] if queries else None)
                for i, (k, v) in contents
            )
            return select_layers([compressor.scorer.score(v) for v in views], budget)

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        compressed()
        peak = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None
        # a host that sets the pace has another one every few milliseconds
        repeats = 99 if tokens < 10_000 and torch.cuda.is_available() else 9
        turns = [(wall_milliseconds(compressed, 1, 0), wall_milliseconds(apart, 1, 0)) for _ in range(repeats + 2)][2:]
        (ms, low, high), (two, *_) = (quartiles([ms for (ms,) in times]) for times in zip(*turns, strict=True))
        parts = [quartiles(wall_milliseconds(part, repeats, 1))[0] for part in (scored, chosen)]
        alone = quartiles(wall_milliseconds(layers, 3, 1))[0]
        pairs = zip(compressed()[1], layers(), strict=True)
        same = np.mean(
            [np.intersect1d(a, b).size / kept for one, other in pairs
             for a, b in zip(to_numpy(one), to_numpy(other), strict=True)]
        )  # fmt: skip
        keys = sum(k.nbytes for k in prefill.keys)
        rows.append(
            {"tokens": tokens, "method": method, "prefill ms": prefill_ms, "ms": ms, "low": low, "high": high,
             "% of prefill": 100 * ms / prefill_ms, "scores first ms": two, "scores ms": parts[0],
             "scores + selection ms": parts[1], "a layer at a time ms": alone, "same tokens": float(same),
             "peak / keys": peak and peak / keys}
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
        rows += measured(backend, tokens, methods, options.kept)
    for row in rows:
        row |= {"shape": options.shape, "card": card()}
    report("scoring", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
