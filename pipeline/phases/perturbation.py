"""Attention output perturbation: how far attention over the prefix moves, seen by the full run's own queries."""

from dataclasses import dataclass

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.attention import attention_log_mass, attention_output
from spectral_kv.heads import by_run, taken
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.recovered_mass import recovered_mass
from spectral_kv.xp import Array, to_numpy


@dataclass(frozen=True)
class Perturbation:
    """AOP and recovered attention mass of the first `positions` continuation tokens.

    Per layer and head, and over all of them; the largest AOP with its place. `aop/projected_...` are the same after
    W_O, of all heads of a layer together.
    """

    positions: int = 64

    def __post_init__(self):
        if self.positions < 1:
            raise ValueError(f"phase.perturbation.positions={self.positions} must be at least 1")

    @property
    def needs(self) -> int:
        return self.positions

    def measure(self, context: Context) -> list[Row]:
        prefill, backend, chosen = context.prefill, context.backend, context.kept
        rows: list[Row] = []
        perturbations, masses, projected = [], [], []
        held = context.contents()
        wholes = context.once(("attention", self.positions), lambda: self._on_the_full_cache(context))
        for layer, (queries, whole, log_mass, whole_projected) in enumerate(wholes):
            kept = held.attended(layer, queries, backend.scaling)
            aop = to_numpy(attention_output_perturbation(kept, whole))  # [query_heads, positions]
            mass = np.ones_like(aop)
            if chosen is not None:
                keys = taken(prefill.keys[layer], chosen[layer])
                ours = by_run(lambda q, k: attention_log_mass(q, k, backend.scaling), queries, keys)
                mass = to_numpy(recovered_mass(ours, log_mass))
            perturbations.append(aop)
            masses.append(mass)
            for head in range(len(aop)):
                rows += [
                    {"layer": layer, "head": head, "metric": "aop/mean", "value": float(aop[head].mean())},
                    {"layer": layer, "head": head, "metric": "aop/max", "value": float(aop[head].max())},
                    {"layer": layer, "head": head, "metric": "mass/mean", "value": float(mass[head].mean())},
                ]
            if whole_projected is not None:
                after = attention_output_perturbation(backend.project(layer, kept), whole_projected)
                after = to_numpy(after)  # [positions]
                projected.append(after)
                rows.append({"layer": layer, "metric": "aop/projected_mean", "value": float(after.mean())})
        aop, mass = np.stack(perturbations), np.stack(masses)
        values = {
            "aop/mean": aop.mean(),
            "aop/p95": np.quantile(aop, 0.95),
            "aop/max": aop.max(),
            "mass/mean": mass.mean(),
            "mass/p05": np.quantile(mass, 0.05),
        }
        if projected:
            values |= {"aop/projected_mean": np.mean(projected), "aop/projected_p95": np.quantile(projected, 0.95)}
        layer, head, position = (int(i) for i in np.unravel_index(aop.argmax(), aop.shape))
        place = {"layer": layer, "head": head, "position": position}
        rows.append({**place, "metric": "aop/largest", "value": float(aop.max())})
        return rows + [{"metric": name, "value": float(value)} for name, value in values.items()]

    def _on_the_full_cache(self, context: Context) -> list[tuple[Array, Array, Array, Array | None]]:
        """Of every layer the queries, their attention output over the prompt, its log mass, the output after W_O."""
        prefill, backend = context.prefill, context.backend
        queries = context.extended(self.positions).queries
        found = []
        for layer, (q, keys, values) in enumerate(zip(queries, prefill.keys, prefill.values, strict=True)):
            output = attention_output(q, keys, values, backend.scaling)
            log_mass = attention_log_mass(q, keys, backend.scaling)
            found.append((q, output, log_mass, backend.project(layer, output)))
        return found
