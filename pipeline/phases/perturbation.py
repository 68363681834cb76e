"""Attention output perturbation: how far attention over the prefix moves, seen by the full run's own queries."""

from dataclasses import dataclass

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.attention import attention_output
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.xp import to_numpy


@dataclass(frozen=True)
class Perturbation:
    """AOP of the first `positions` continuation tokens: per layer and head, and over all of them."""

    positions: int = 64

    def __post_init__(self):
        if self.positions < 1:
            raise ValueError(f"phase.perturbation.positions={self.positions} must be at least 1")

    @property
    def needs(self) -> int:
        return self.positions

    def measure(self, context: Context) -> list[Row]:
        full, backend = context.full, context.backend
        rows: list[Row] = []
        everything = []
        held = backend.contents(context.compressed.cache)
        for layer, queries in enumerate(full.extended(self.positions).queries):
            kept = attention_output(queries, held.keys[layer], held.values[layer], backend.scaling)
            whole = attention_output(queries, full.prefill.keys[layer], full.prefill.values[layer], backend.scaling)
            aop = to_numpy(attention_output_perturbation(kept, whole))  # [query_heads, positions]
            everything.append(aop)
            for head, values in enumerate(aop):
                rows += [
                    {"layer": layer, "head": head, "metric": "aop/mean", "value": float(values.mean())},
                    {"layer": layer, "head": head, "metric": "aop/max", "value": float(values.max())},
                ]
        aop = np.stack(everything)
        for name, value in (("mean", aop.mean()), ("p95", np.quantile(aop, 0.95)), ("max", aop.max())):
            rows.append({"metric": f"aop/{name}", "value": float(value)})
        return rows
