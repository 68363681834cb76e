"""Bases of a model's cache, for the library's spectral storage.

    python -m pipeline.bases model=smollm2 --layers 5
    python -m pipeline.bases --out bases.safetensors

Runs the model over calibration text (by default mixed: docstrings, source code, packages' descriptions, licences, a
novel) and writes what `spectral_kv.storage.spectral.SpectralStorage` needs to code its cache. The file says how many
runs of ten words the text shares with the documents that the project evaluates on. A measurement that was broken off
goes on where it was when the command is given again.
"""

import argparse
import sys
from pathlib import Path

from pipeline.documents.mixed import shared_with_evaluation
from pipeline.job import prepare, provenance
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from pipeline.show.progress import progress

TORCH = "spectral_kv.backends.torch.TorchBackend"


def bases(overrides: list[str], out: Path | None, layers: int, share: float) -> Path:
    """Measure and write the bases of the configured model, and return the path.

    `share` of the components of all blocks is kept, those that matter most.
    """
    job = prepare(composed(["method=full", "document=mixed", *overrides]))
    settings = job.settings
    if settings.backend._target_ != TORCH:
        raise InputError(f"backend={settings.backend.name} gives no gradients: bases are measured with backend=torch")
    from pipeline.run import loaded
    from spectral_kv.backends.torch_bases import measure

    _, backend = loaded(settings, job.checkpoint)
    prompt = settings.documents.tokens
    texts = [job.checkpoint.tokenizer.decode(window.tolist()) for window in job.windows]
    path = out or settings.outputs / "bases" / f"{settings.model.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = measure(
        backend, job.windows, prompt, layers, sums=path.with_suffix(".sums"),
        progress=lambda windows: progress(windows, f"measuring bases of {settings.model.name}", logged=True),
        model=job.checkpoint.hash, document=job.document_hash, **provenance(job),
        overlap=str(len(shared_with_evaluation(texts))),
    )  # fmt: skip
    found.truncated(share).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline")
    parser.add_argument("--out", type=Path, help="file to write (default: <outputs>/bases/<model>.safetensors)")
    parser.add_argument("--layers", type=int, default=4, help="most layers of a group (default: 4)")
    parser.add_argument(
        "--share", type=float, default=0.85, help="share of the components that is kept (default: 0.85)"
    )
    arguments = parser.parse_intermixed_args()
    with reporting(sys.argv[1:]):
        if arguments.layers < 1 or not 0 < arguments.share <= 1:
            raise InputError(
                f"--layers {arguments.layers} must be at least 1, and --share {arguments.share} above 0 and at most 1"
            )
        print(bases(arguments.overrides, arguments.out, arguments.layers, arguments.share))


if __name__ == "__main__":
    main()
