"""Query statistics of a model, for the methods that read calibration.

    python -m pipeline.calibrate model=qwen2_5_0_5b model.path=/checkpoint
    python -m pipeline.calibrate document=file 'document.path=notes/*.txt' --out notes.safetensors
    python -m pipeline.calibrate --kvzap
    python -m pipeline.calibrate --from-pt qwen3_8b.pt --out qwen3_8b.safetensors

Runs the model over calibration text (by default the standard library's docstrings, which share nothing with the
evaluation documents) and writes the mean un-rotated query of every head; or converts a file of the method's authors.
Use the result as `model.calibration`. With `--kvzap` prompts are repeated and the maps of method=ridge_kvzap fitted to
what KVzip says of them: `method.weights`.
"""

import argparse
import sys
from pathlib import Path

from pipeline.job import prepare, provenance
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.show.progress import progress
from spectral_kv.calibration import observe
from spectral_kv.compressor import Compressor
from spectral_kv.scorers.ridge_kvzap import Ridge
from spectral_kv.storage.dense import Dense


def calibrate(overrides: list[str], out: Path | None) -> Path:
    """Write the statistics of the configured model and return the path."""
    job = prepare(composed(["method=full", "document=docstrings", "document.count=16", *overrides]))
    from pipeline.run import loaded

    _, backend = loaded(job.settings, job.checkpoint)
    windows = [window[: job.settings.documents.tokens] for window in job.windows]
    sums = observe(
        backend, progress(windows, f"calibrating {job.settings.model.name}", logged=True), job.settings.backend.chunk
    )
    path = out or job.settings.outputs / "calibration" / f"{job.settings.model.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics = sums.statistics(model=job.checkpoint.hash, document=job.document_hash, **provenance(job))
    statistics.save(path)
    print(
        f"{statistics.metadata['tokens']} tokens in {len(windows)} windows of {job.settings.documents.source}",
        file=sys.stderr,
    )
    return path


def fit_kvzap(overrides: list[str], out: Path | None, strength: float = 1e-4) -> Path:
    """Fit the maps of Ridge-KVzap to KVzip's scores of the configured documents and return their path."""
    own = ["method=kvzip", "document=mixed", "document.tokens=2048", "document.count=16"]
    job = prepare(composed([*own, *overrides]))
    from pipeline.run import encoding, loaded

    settings = job.settings
    _, backend = loaded(settings, job.checkpoint)
    shape, dense = backend.shape, Dense()
    compressor = Compressor(backend, settings.method.scorer, job.budget, dense, encode=encoding(job.checkpoint))
    ridge = Ridge(shape.layers, shape.kv_heads, 2 * shape.dim + 3)
    for window in progress(job.windows, f"fitting {settings.model.name}", logged=True):
        prefill = backend.prefill(window[: settings.documents.tokens], 0, settings.backend.chunk)
        evictable = compressor.budget.evictable(len(prefill.tokens))
        for layer, scores in enumerate(compressor.repeated(prefill)):
            content = prefill.keys[layer], prefill.values[layer], prefill.positions[layer]
            ridge.add(compressor.view(layer, *content, evictable), scores)
    path = out or settings.outputs / "calibration" / f"{settings.model.name}_kvzap.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    maps = ridge.fit(strength, model=job.checkpoint.hash, document=job.document_hash, **provenance(job))
    maps.save(path)
    print(
        f"{maps.metadata['tokens']} tokens in {len(job.windows)} windows of {settings.documents.source}; the maps "
        f"foretell {float(maps.metadata['variance']):.0%} of the variance of log scores",
        file=sys.stderr,
    )
    return path


def convert(source: Path, out: Path) -> Path:
    """Write what a file of the authors' code holds to `out` and return it."""
    from spectral_kv.backends.torch_statistics import read_pt

    try:
        statistics = read_pt(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--from-pt: {error}; or measure with `python -m pipeline.calibrate model=...`") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline")
    parser.add_argument("--out", type=Path, help="file to write (default: <outputs>/calibration/<model>.safetensors)")
    parser.add_argument("--from-pt", type=Path, help="convert this file of the method's authors instead of measuring")
    parser.add_argument("--kvzap", action="store_true", help="fit the maps of method=ridge_kvzap instead")
    arguments = parser.parse_intermixed_args()
    if arguments.from_pt and (arguments.overrides or not arguments.out):
        parser.error("--from-pt converts a file whatever the settings are: give --out and no overrides")
    with reporting(sys.argv[1:]):
        if arguments.from_pt:
            print(convert(arguments.from_pt, arguments.out))
        else:
            made = fit_kvzap if arguments.kvzap else calibrate
            print(made(arguments.overrides, arguments.out))


if __name__ == "__main__":
    main()
