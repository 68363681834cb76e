"""Peak memory of scoring one layer, beside its keys, and of a prefill, whole and in chunks.

    python -m benchmarks.memory
    python -m benchmarks.memory --tokens 16384 --shape llama-3.1-8b --methods wavelet,snapkv
    python -m benchmarks.memory --prefill --shape reference --tokens 32768 --chunk 1024

Every method scores random bfloat16 keys in a process of its own; `peak` is by how much its memory grows at most during
the first call, tables included, in units of the keys. `whole` is the same without blocks; times are of a second call.
A method that reads all queries gets the last `--queries`: its peak does not grow with their number, its time does.

`--prefill` runs a prompt of random tokens through a model with random weights in float32, whole and in chunks, each in
a process of its own: by how much its memory grows, and how far the last logits, and the last layer's keys of all
tokens, are apart at most.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.clock import Row, device, report
from spectral_kv import xp
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.calibration import QueryStatistics
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView, Scorer
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.h2o import H2O
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.observed_attention import ObservedAttention
from spectral_kv.scorers.oracle_mass import OracleMass
from spectral_kv.scorers.oracle_value import OracleValue
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tova import Tova
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri

METHODS = {
    "fourier": Fourier(), "fourier-shuffled": Fourier(shuffle_seed=0), "wavelet": Wavelet(),
    "wavelet-centred": Wavelet(centred=True), "wavelet-stationary": Wavelet(transform="stationary"),
    "wavelet_fourier": WaveletFourier(), "wavelet_fourier-flat": WaveletFourier(cascade=False),
    "wavelet_fourier-stationary": WaveletFourier(transform="stationary"), "wavelet_tri": WaveletTri(),
    "tri": TriAttention(), "tri-max": TriAttention(aggregation="max"), "tri-unrotated": TriAttention(path="unrotated"),
    "knorm": Knorm(), "keydiff": KeyDiff(), "snapkv": SnapKV(), "tova": Tova(),
    "expected_attention": ExpectedAttention(), "observed_attention": ObservedAttention(), "h2o": H2O(),
    "oracle_mass": OracleMass(), "oracle_value": OracleValue(), "random": Random(), "streaming": Streaming(),
}  # fmt: skip


def layer(shape: str, tokens: int, observed: int) -> LayerView:
    """Random keys, values and queries of one layer; statistics of random queries."""
    known = shapes.SHAPES[shape]
    query_heads, kv_heads = known["num_attention_heads"], known["num_key_value_heads"]
    dim = known["hidden_size"] // query_heads
    generator = torch.Generator(device()).manual_seed(0)

    def rows(heads: int, count: int) -> torch.Tensor:
        return torch.randn(heads, count, dim, generator=generator, device=device(), dtype=torch.bfloat16)

    rng = np.random.default_rng(0)
    mu = rng.normal(size=(1, query_heads, dim // 2)) + 1j * rng.normal(size=(1, query_heads, dim // 2))
    rope = Rope(1e6 ** -(np.arange(dim // 2) / (dim // 2)))
    return LayerView(
        rows(kv_heads, tokens), rows(kv_heads, tokens), rope, np.arange(tokens), slice(4, tokens - 64),
        scaling=dim**-0.5, queries=rows(query_heads, observed), future=rows(query_heads, 64),
        statistics=QueryStatistics(mu, 2 * np.abs(mu)),
    )  # fmt: skip


class Peak:
    """By how many bytes the memory in use grows at most, from its making on.

    Of the device's allocator on a GPU; elsewhere of the process, as Linux counts it.
    """

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.before = self._now("VmRSS")

    def bytes(self) -> int:
        return self._now("VmHWM") - self.before

    def _now(self, line: str) -> int:
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated() if line == "VmRSS" else torch.cuda.max_memory_allocated()
        found = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(line))
        return 1024 * int(found.split()[1])


def score(scorer: Scorer, shape: str, tokens: int, observed: int, whole: bool) -> tuple[float, float]:
    """Peak in units of the keys, and seconds."""
    if whole:
        xp.ROOM = xp.ACCELERATOR_ROOM = 2**60
    scorer.score(layer(shape, 1024, 128))  # what is loaded at the first use is no temporary
    made = layer(shape, tokens, min(getattr(scorer, "window", None) or observed, tokens))
    peak = Peak()
    scorer.score(made)
    units = peak.bytes() / made.keys.nbytes
    begin = time.perf_counter()
    scorer.score(made)[0, 0].item()
    return units, time.perf_counter() - begin


def alone(run: Callable, *arguments) -> tuple:
    """What `run` returns, in a process of its own."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # what is freed goes back at once: only what is in use counts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def prefill(shape: str, tokens: int, chunk: int | None) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Peak in MiB, seconds, the last logits `[vocabulary]` and the last layer's keys `[kv_heads, tokens, dim]`."""
    backend = TorchBackend.wrap(shapes.model(shape, device(), torch.float32), "float32")
    ids = np.random.default_rng(0).integers(0, backend.shape.vocabulary, size=tokens)
    backend.prefill(ids[:64], 0, 32)
    peak, begin = Peak(), time.perf_counter()
    found = backend.prefill(ids, 0, chunk)
    seconds = time.perf_counter() - begin
    return peak.bytes() / 2**20, seconds, xp.to_numpy(found.logits), xp.to_numpy(found.keys[-1])


def prefills(shape: str, tokens: int, chunk: int) -> list[Row]:
    runs = {"whole": alone(prefill, shape, tokens, None), f"chunks of {chunk}": alone(prefill, shape, tokens, chunk)}
    peak, _, logits, keys = runs["whole"]
    return [
        {"prefill": name, "peak MiB": mib, "of whole": mib / peak, "seconds": seconds,
         "logits apart": float(np.abs(ours - logits).max()), "logits spread": float(np.ptp(logits)),
         "keys apart": float(np.abs(cached - keys).max())}
        for name, (mib, seconds, ours, cached) in runs.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=shapes.SHAPES)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--prefill", action="store_true", help="of a prompt instead of scores")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--csv")
    options = parser.parse_args()
    if options.prefill:
        return report("memory of a prefill", prefills(options.shape, options.tokens, options.chunk), options.csv)
    rows: list[Row] = []
    for name in options.methods.split(","):
        given = (METHODS[name], options.shape, options.tokens, options.queries)
        peak, seconds = alone(score, *given, False)
        whole, whole_seconds = alone(score, *given, True)
        rows.append({"method": name, "peak": peak, "whole peak": whole, "time ratio": seconds / whole_seconds})
    report("memory", rows, options.csv)


if __name__ == "__main__":
    main()
