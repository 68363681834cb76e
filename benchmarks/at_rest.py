"""Real windows as `storage=spectral_at_rest` codes them, for the benchmarks that look inside."""

import argparse
from collections.abc import Iterator

import numpy as np

from pipeline.job import Job, prepare
from pipeline.run import loaded
from pipeline.settings.compose import composed
from spectral_kv.at_rest.content import AtRest
from spectral_kv.at_rest.rounding import Components
from spectral_kv.at_rest.storage import SpectralAtRest, components_of
from spectral_kv.storage.windowed import part


def asked(description: str, ratios: str) -> tuple[Job, list[float]]:
    """The job that the command line sets, and the ratios."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--ratios", default=ratios, help="times smaller than in 16 bits")
    arguments = parser.parse_intermixed_args()
    job = prepare(composed(["method=full", "storage=spectral_at_rest", *arguments.overrides]))
    return job, [float(ratio) for ratio in arguments.ratios.split(",")]


def coded(job: Job, ratios: list[float]) -> Iterator[tuple[float, Components, AtRest]]:
    """Of every window at every ratio: components, and what is written of them.

    Without a transform along tokens.
    """
    _, backend = loaded(job.settings, job.checkpoint)
    tokens, shape = job.settings.documents.tokens, backend.shape
    for window in job.windows:
        prefill = backend.prefill(window[:tokens], 1)
        for ratio in ratios:
            storage = SpectralAtRest(job.settings.storage.bases, ratio, along=None)
            positions = np.arange(storage.sinks, tokens - storage.recent)
            written = storage.encode(prefill.keys, prefill.values, np.arange(tokens), backend.rope)
            pairs = [tuple(part(x, positions[0], positions[-1] + 1) for x in pair)
                     for pair in zip(prefill.keys, prefill.values, strict=True)]  # fmt: skip
            bases = storage.read((shape.layers, shape.kv_heads, shape.dim))
            yield ratio, components_of(bases.blocks, pairs, positions, backend.rope), written
