"""Fidelity: keys and values reconstructed from the compressed cache, against those of the full one."""

from dataclasses import dataclass

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.heads import runs
from spectral_kv.metrics.fidelity import cosine, interpolated, relative_error, spectral_distance
from spectral_kv.xp import float32, to_numpy

METRICS = {  # and whether of keys, or of values
    "fidelity/key_error": (relative_error, True),
    "fidelity/key_cosine": (cosine, True),
    "fidelity/key_spectrum": (spectral_distance, True),
    "fidelity/value_error": (relative_error, False),
    "fidelity/value_cosine": (cosine, False),
}


@dataclass(frozen=True)
class Fidelity:
    """Relative error and cosine of keys (before RoPE) and values, and the distance between power spectra of keys.

    Evicted tokens are interpolated between their kept neighbours, packed ones are dequantised. The means are over
    layers and KV heads.
    """

    needs = 0

    def measure(self, context: Context) -> list[Row]:
        prefill, rope = context.prefill, context.backend.rope
        held = context.contents()
        tokens = len(prefill.tokens)
        rows: list[Row] = []
        for layer in range(len(held.positions)):
            found = {name: [] for name in METRICS}
            for heads, (kept, ours, positions) in runs(held.keys[layer], held.values[layer], held.positions[layer]):
                values = prefill.values[layer][heads]
                keys = rope.unrotate(float32(prefill.keys[layer][heads]), np.arange(tokens))
                kept = interpolated(rope.unrotate(float32(kept), positions), positions, tokens)
                ours = interpolated(ours, positions, tokens)
                for name, (metric, of_keys) in METRICS.items():
                    found[name].append(to_numpy(metric(kept, keys) if of_keys else metric(ours, values)))
            rows += [{"layer": layer, "metric": m, "value": float(np.concatenate(v).mean())} for m, v in found.items()]
        means = {m: np.mean([row["value"] for row in rows if row["metric"] == m]) for m in METRICS}
        return rows + [{"metric": name, "value": float(value)} for name, value in means.items()]
