"""What a transform along tokens saves a cache at rest: a cosine transform or wavelets on top of the bases' components.

    python -m benchmarks.along_tokens document.count=2
    python -m benchmarks.along_tokens document=book document.title=king_james document.count=2

Further arguments are settings of `python -m pipeline`. Blocks of tokens are transformed component by component, then
coded as `storage=spectral_at_rest` codes them, whose scale of a token becomes one of a frequency. Bytes are those at
the mean squared error that the step leaves without a transform.
"""

import numpy as np
import pandas as pd
import pywt
import torch
from scipy.fft import dct

from benchmarks.at_rest import asked, coded
from spectral_kv.at_rest.rounding import Components

BLOCKS = (8, 32, 64)  # tokens of a cosine transform
WAVELETS = {"haar": 3, "db2": 3, "sym4": 3}  # levels, in blocks of 64 tokens


def matrices() -> dict[str, np.ndarray | None]:
    """Orthonormal transforms `[tokens, tokens]` of a block, by name."""
    found = {"none": None} | {f"cosine, {n} tokens": dct(np.eye(n), axis=0, norm="ortho") for n in BLOCKS}
    for name, level in WAVELETS.items():
        coefficients = pywt.wavedec(np.eye(64), name, mode="periodization", level=level, axis=0)
        found[f"{name}, {level} levels"] = np.concatenate(coefficients)
    return found


def transformed(components: Components, matrix: np.ndarray | None) -> Components:
    """With whole blocks of tokens transformed."""
    if matrix is None:
        return components
    size, values = len(matrix), components.values.clone()
    blocks = values[:, : values.shape[1] // size * size].unflatten(1, (-1, size))
    blocks.copy_(blocks @ torch.from_numpy(matrix.T.astype(np.float32)).to(values.device))
    return Components(values, components.block)


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
    job, ratios = asked(__doc__, "16,24")
    rows = []
    for ratio, plainly, written in coded(job, ratios):
        step, plain = written.header["step"], None
        for name, matrix in matrices().items():
            components = transformed(plainly, matrix)
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
