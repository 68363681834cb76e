"""Bytes of codes at rest beside the order-0 entropy of their numbers, and beside zstd where it is installed.

    python -m benchmarks.order_0 document.count=2
    python -m benchmarks.order_0 document=book document.title=king_james document.count=2

Further arguments are settings of `python -m pipeline`. Order 0 is every component on its own with frequencies of its
own, which nobody writes down; the bytes of the codes are all that is needed to read them. zstd (`pip install
zstandard`) has the same numbers, a byte each, component by component.
"""

import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd

from benchmarks.at_rest import asked, coded

LEVELS = (3, 19)


def main() -> None:
    job, ratios = asked(__doc__, "10,16,24")
    rows = []
    for ratio, components, written in coded(job, ratios):
        rounded = components.rounded(written.header["step"])
        plain = np.clip(rounded.numbers().cpu().numpy(), -128, 127).astype(np.int8).tobytes()
        sizes = {"codes": sum(x.nbytes for x in written.part("coded").values())}
        if find_spec("zstandard"):
            import zstandard

            sizes |= {f"zstd {level}": len(zstandard.compress(plain, level=level)) for level in LEVELS}
        order_0 = rounded.order_0
        rows.append({"ratio": ratio} | {name: 8 * size / order_0 for name, size in sizes.items()})
        print(*(f"{name} {value:.4f}" for name, value in rows[-1].items()), sep=", ", file=sys.stderr, flush=True)
    print(f"{len(job.windows)} windows of {job.settings.documents.source}: bytes, relative to the order-0 entropy")
    print(pd.DataFrame(rows).groupby("ratio").agg(["mean", "min", "max"]).round(4).to_markdown())


if __name__ == "__main__":
    main()
