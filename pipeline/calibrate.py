"""Query statistics of a model, for the methods that read calibration.

    python -m pipeline.calibrate model=qwen2_5_0_5b model.path=/checkpoint
    python -m pipeline.calibrate document=file 'document.path=notes/*.txt' --out notes.safetensors

Runs the model over calibration text (by default the standard library's docstrings, which share nothing with the
evaluation documents) and writes the mean un-rotated query of every head. Use the file as `model.calibration`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from pipeline.cli import reporting
from pipeline.compose import composed
from pipeline.job import prepare
from pipeline.progress import progress
from spectral_kv.calibration import Accumulator
from spectral_kv.xp import float32, to_numpy


def calibrate(overrides: list[str], out: Path | None) -> Path:
    """Write the statistics of the configured model and return the path."""
    job = prepare(composed(["method=full", "document=docstrings", "document.count=16", *overrides]))
    from pipeline.run import loaded

    _, backend = loaded(job.settings, job.checkpoint)
    shape = backend.shape
    sums = Accumulator(shape.layers, shape.query_heads, shape.dim // 2)
    tokens = job.settings.documents.tokens
    positions = np.arange(tokens)
    for window in progress(job.windows, f"calibrating {job.settings.model.name}"):
        for layer, queries in enumerate(backend.prefill(window[:tokens], observe=tokens).queries):
            sums.add(layer, to_numpy(backend.rope.unrotate(float32(queries), positions)))
    path = out or job.settings.outputs / "calibration" / f"{job.settings.model.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    sums.statistics(model=job.checkpoint.hash, text=job.settings.documents.source, document=job.document_hash).save(
        path
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline")
    parser.add_argument("--out", type=Path, help="file to write (default: <outputs>/calibration/<model>.safetensors)")
    arguments = parser.parse_intermixed_args()
    with reporting(sys.argv[1:]):
        print(calibrate(arguments.overrides, arguments.out))


if __name__ == "__main__":
    main()
