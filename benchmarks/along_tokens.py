"""What a transform along tokens saves a cache at rest: a cosine transform or wavelets on top of the bases' components.

    python -m benchmarks.along_tokens document.count=2
    python -m benchmarks.along_tokens document=book document.title=king_james document.count=2

Further arguments are settings of `python -m pipeline`. Blocks of tokens are transformed component by component, then
coded as `storage=spectral_at_rest` codes them, whose scale of a token becomes one of a frequency. Bytes are those at
the mean squared error that the step leaves without a transform.
"""

import argparse

import numpy as np
import pandas as pd
import pywt
from scipy.fft import dct

from pipeline.job import prepare
from pipeline.run import loaded
from pipeline.settings.compose import composed
from spectral_kv.codec.variable_rate import Components
from spectral_kv.storage.spectral_at_rest import SpectralAtRest, components_of
from spectral_kv.storage.windowed import part

BLOCKS = (8, 32, 64)  # tokens of a cosine transform
WAVELETS = {"haar": 3, "db2": 3, "sym4": 3}  # levels, in blocks of 64 tokens


def matrices() -> dict[str, np.ndarray | None]:
    """Orthonormal transforms `[tokens, tokens]` of a block, by name."""
    found = {"none": None} | {f"cosine, {n} tokens": dct(np.eye(n), axis=0, norm="ortho") for n in BLOCKS}
    for name, level in WAVELETS.items():
        coefficients = pywt.wavedec(np.eye(64), name, mode="periodization", level=level, axis=0)
        found[f"{name}, {level} levels"] = np.concatenate(coefficients)
    return found


def transformed(y: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Components `[tokens, components]` with whole blocks of tokens transformed."""
    if matrix is None:
        return y
    size = len(matrix)
    whole = len(y) // size * size
    blocks = y[:whole].reshape(-1, size, y.shape[1])
    return np.concatenate([(matrix.astype(np.float32) @ blocks).reshape(whole, -1), y[whole:]])


def at_distortion(components: Components, step: float, wanted: float | None) -> tuple[float, float]:
    """Bits and mean squared error; bits at the error that is `wanted`, where one is, by their slope at the step."""

    def measured(at: float) -> tuple[float, float]:
        rounded = components.rounded(at)
        return rounded.bits, rounded.distortion(components.values, at)

    bits, error = measured(step)
    if wanted is None:
        return bits, error
    more, other = measured(1.03 * step)
    return bits + (more - bits) / np.log(other / error) * np.log(wanted / error), wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--ratios", default="16,24", help="times smaller without a transform")
    arguments = parser.parse_intermixed_args()
    job = prepare(composed(["method=full", "storage=spectral_at_rest", *arguments.overrides]))
    _, backend = loaded(job.settings, job.checkpoint)
    tokens, shape = job.settings.documents.tokens, backend.shape
    rows = []
    for window in job.windows:
        prefill = backend.prefill(window[:tokens], 1)
        for ratio in map(float, arguments.ratios.split(",")):
            storage = SpectralAtRest(job.settings.storage.bases, ratio)
            positions = np.arange(storage.sinks, tokens - storage.recent)
            written = storage.encode(prefill.keys, prefill.values, np.arange(tokens), backend.rope)
            step = written.header["step"]
            pairs = [tuple(part(x, positions[0], positions[-1] + 1) for x in pair)
                     for pair in zip(prefill.keys, prefill.values, strict=True)]  # fmt: skip
            bases = storage.read((shape.layers, shape.kv_heads, shape.dim))
            blocks = [components_of(block, pairs, positions, backend.rope) for block in bases.blocks]
            plain = None
            for name, matrix in matrices().items():
                components = Components([transformed(y, matrix) for y in blocks])
                bits, error = at_distortion(components, step, plain and plain[1])
                plain = plain or (bits, error)
                rows.append({"along tokens": name, "ratio": ratio, "bytes, share": bits / plain[0]})
    table = (
        pd.DataFrame(rows).groupby(["along tokens", "ratio"], sort=False)["bytes, share"].agg(["mean", "min", "max"])
    )
    print(f"{len(job.windows)} windows of {job.settings.documents.source}")
    print(table.unstack().round(4).to_markdown())


if __name__ == "__main__":
    main()
