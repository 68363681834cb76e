"""What compression costs beside the prefill: seconds of both, in one run.

    python benchmarks/compression.py
    python benchmarks/compression.py method=wavelet,snapkv document.tokens=8192 document.count=3

Settings are those of `python -m pipeline`; commas in `method` separate the methods. Every document is prefilled and
then compressed by each method; prefill and compression take turns, so that both see the same machine. Compression is
scoring, selection and copying the kept tokens. One document more, the first, is not counted: it warms up.
"""

import sys

import numpy as np
import pandas as pd

from pipeline.job import prepare
from pipeline.run import loaded
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.stages.compress import compress
from pipeline.stages.prefill import FullRun
from spectral_kv.compressor import Compressor, SharedScores, observed

METHODS = (
    "fourier,wavelet,wavelet_fourier,wavelet_tri,tri,turboquant,random,streaming,knorm,keydiff,snapkv,tova,h2o,"
    "observed_attention,expected_attention"
)


def measured(overrides: list[str]) -> pd.DataFrame:
    """One row a method: median seconds of prefill and compression, and quartiles of their ratio in percent."""
    settings = dict(o.partition("=")[::2] for o in ["method=" + METHODS, "document.count=6", *overrides])
    methods = settings.pop("method").split(",")
    shared = [f"{key}={value}" for key, value in settings.items()]
    jobs = [prepare(composed([*shared, f"method={method}"])) for method in methods]
    if len(jobs[0].windows) < 2:
        raise InputError(f"document.count={len(jobs[0].windows)}: the first document warms up, so write at least 2")
    _, backend = loaded(jobs[0].settings, jobs[0].checkpoint)
    seconds: dict[str, list[tuple[float, float]]] = {job.settings.method.title: [] for job in jobs}
    for index, window in enumerate(jobs[0].windows):
        for job in jobs:
            tokens, scorer = job.settings.documents.tokens, job.settings.method.scorer
            compressor = Compressor(backend, scorer, job.budget, job.settings.storage, job.statistics)
            full = FullRun(backend, window, tokens, observed(scorer, tokens))
            compressed = compress(compressor, full, SharedScores(), index)
            if index > 0:
                seconds[job.settings.method.title].append((full.seconds, compressed.seconds))
    rows = []
    for title, pairs in seconds.items():
        prefill, compression = np.array(pairs).T
        low, middle, high = np.quantile(100 * compression / prefill, [0.25, 0.5, 0.75])
        rows.append((title, np.median(prefill), np.median(compression), middle, f"[{low:.1f}, {high:.1f}]"))
    columns = ["method", "prefill, s", "compression, s", "% of the prefill", "quartiles"]
    return pd.DataFrame(rows, columns=columns)


if __name__ == "__main__":
    with reporting(sys.argv[1:]):
        print(measured(sys.argv[1:]).to_markdown(index=False, floatfmt=("", ".3f", ".3f", ".1f")))
