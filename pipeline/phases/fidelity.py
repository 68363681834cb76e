"""Fidelity: keys and values reconstructed from the compressed cache, against those of the full one."""

from dataclasses import dataclass

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.metrics.fidelity import cosine, interpolated, relative_error, spectral_distance
from spectral_kv.xp import float32, to_numpy


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
        for layer, positions in enumerate(held.positions):
            keys = rope.unrotate(float32(prefill.keys[layer]), np.arange(tokens))
            ours = interpolated(rope.unrotate(float32(held.keys[layer]), positions), positions, tokens)
            values = interpolated(held.values[layer], positions, tokens)
            found = {
                "fidelity/key_error": relative_error(ours, keys),
                "fidelity/key_cosine": cosine(ours, keys),
                "fidelity/key_spectrum": spectral_distance(ours, keys),
                "fidelity/value_error": relative_error(values, prefill.values[layer]),
                "fidelity/value_cosine": cosine(values, prefill.values[layer]),
            }
            rows += [{"layer": layer, "metric": m, "value": float(to_numpy(v).mean())} for m, v in found.items()]
        means = {m: np.mean([row["value"] for row in rows if row["metric"] == m]) for m in found}
        return rows + [{"metric": name, "value": float(value)} for name, value in means.items()]
