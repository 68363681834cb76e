"""Rows of runs that were never made: their means can be computed by hand."""

import numpy as np
import pandas as pd

from pipeline.statistics import estimate

DOCUMENTS = 16
# AOP of document d is base + 0.01 d, so its mean is base + 0.075; ND-PPL is ten times the base, give or take
AOP = {
    "full": 0.0, "fourier": 0.5, "wavelet": 0.4, "wavelet_fourier": 0.6, "wavelet_tri": 0.3, "tri": 0.2,
    "turboquant": 0.1, "random": 0.9, "streaming": 0.7,
}  # fmt: skip


def rows_of(base: float) -> list[dict]:
    rows = []
    for d in range(DOCUMENTS):
        values = {
            "aop/mean": base + 0.01 * d,
            "ppl/nd": 10 * base + 0.001 * (d % 3),
            "ppl/kl": base,
            "memory/ratio": 8.0,
            "drift/aop_first": base + 0.1,
            "drift/aop_last": base + 0.1 + 0.12 * (1 + d % 2),
            "drift/aop_slope": 0.02 * (1 + d % 2),  # on average .03, so .12 over four steps
        }
        rows += [{"document": d, "metric": metric, "value": value} for metric, value in values.items()]
        for layer in range(2):
            rows += [
                {"document": d, "layer": layer, "head": head, "metric": "aop/mean", "value": base + layer + head}
                for head in range(2)
            ]
            rows += [
                {"document": d, "layer": layer, "frequency": f, "metric": metric, "value": 1.0 / f}
                for f in (0.1, 0.2, 0.4)
                for metric in ("spectrum/full", "spectrum/rebuilt")
            ]
    rows += [{"document": 0, "turn": turn, "metric": "drift/aop", "value": base} for turn in range(1, 6)]
    rows += [
        {"document": 0, "layer": layer, "position": p, "metric": "kept/share", "value": 0.5}
        for layer in range(2)
        for p in (0, 16, 32)
    ]
    return rows


def metrics_of(rows: list[dict]) -> dict[str, float]:
    table = pd.DataFrame(rows)
    whole = table[table[["layer", "position", "turn"]].isna().all(axis=1)]
    found = {}
    for metric, group in whole.groupby("metric"):
        value = estimate(group["value"].to_numpy())
        found[metric] = value.mean
        if np.isfinite(value.low):
            found |= {f"{metric}_low": value.low, f"{metric}_high": value.high}
    return found | {"memory/mb": 2.0}
