"""What the transform coder takes beside the prefill: into codes that live, into bytes at rest, and back.

    python -m benchmarks.codec
    python -m benchmarks.codec --shape reference --tokens 4096 --csv codec.csv

A model of a published shape with random weights is prefilled, and its bases are random rotations over variances that
fall as those of the embedded model do: time depends on neither. Tokens have nothing in common with their neighbours, so
that a transform along them hardly pays, and something with `--alike 4`. `live` codes a cache 8 times smaller, `at rest`
writes it `--ratio` times smaller, the search for the step included; `read` brings it back. Milliseconds by the host's
clock, in percent of the prefill and in megabytes of the 16-bit cache a second.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.clock import Row, card, device, quartiles, report, wall_milliseconds
from spectral_kv.at_rest.storage import SpectralAtRest
from spectral_kv.backends.base import Prefill
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.codec.bases import Bases, Block, groups
from spectral_kv.quantization.rotation import haar
from spectral_kv.storage.spectral import SpectralStorage

FALL = 1e-5  # of the last component's variance from the first's
WORK = ("live", "at rest", "read")
SHARE = 0.85  # of the components that are kept, as by `python -m pipeline.bases`


def random_bases(backend: TorchBackend, layers: int) -> Bases:
    """Bases in groups of at most `layers` layers."""
    shape, blocks = backend.shape, []
    for group in groups(shape.layers, layers):
        columns = 2 * len(group) * shape.kv_heads * shape.dim
        kept = int(SHARE * columns) // 8 * 8
        variances = np.geomspace(1, FALL, columns).astype(np.float32)
        blocks.append(
            Block(
                group,
                np.zeros(columns, dtype=np.float32),
                np.ones(columns, dtype=np.float32),
                haar(columns, (0,))[:, :kept].astype(np.float16),
                variances[:kept],
            )
        )
    return Bases(tuple(blocks), shape.dim)


def typical(prefill: Prefill, backend: TorchBackend, bases: Bases, alike: int = 1) -> Prefill:
    """The prefill with keys and values that have the variances of the bases, and of which so many tokens are alike."""
    tokens, shape = len(prefill.tokens), backend.shape
    keys, values = list(prefill.keys), list(prefill.values)
    generator = torch.Generator(keys[0].device).manual_seed(0)
    for block in bases.blocks:
        synthesis, scale = (torch.from_numpy(x).to(keys[0].device) for x in (block.synthesis, block.variances**0.5))
        z = torch.randn(tokens + alike - 1, len(scale), generator=generator, device=keys[0].device) * scale
        z = z.unfold(0, alike, 1).sum(dim=-1) / alike**0.5
        rows = (z @ synthesis).reshape(tokens, -1, shape.dim).transpose(0, 1).split(shape.kv_heads)
        for index, layer in enumerate(block.layers):
            keys[layer] = backend.rope.rotate(rows[index], np.arange(tokens)).to(keys[layer].dtype)
            values[layer] = rows[len(block.layers) + index].to(values[layer].dtype)
    return Prefill(prefill.tokens, keys, values, prefill.queries, prefill.logits)


def measured(
    backend: TorchBackend,
    tokens: int,
    layers: int,
    ratio: float,
    folder: str,
    wanted: tuple[str, ...] = WORK,
    alike: int = 1,
) -> list[Row]:
    ids = np.random.default_rng(0).integers(0, backend.shape.vocabulary, size=tokens)
    bases = random_bases(backend, layers)
    path = str(Path(folder) / "bases.safetensors")
    bases.save(path)
    prefill_ms = quartiles(wall_milliseconds(lambda: backend.prefill(ids, 1), 3, 1))[0]
    prefill = typical(backend.prefill(ids, 1), backend, bases, alike)
    shape, positions = (backend.shape.layers, backend.shape.kv_heads, backend.shape.dim), np.arange(tokens)
    live, rest = SpectralStorage(path), SpectralAtRest(path, ratio)
    written = rest.encode(prefill.keys, prefill.values, positions, backend.rope) if set(wanted) != {"live"} else None
    full = sum(x.numel() * 2 for x in (*prefill.keys, *prefill.values))
    work = {
        "live": lambda: backend.compress(prefill, None, live),
        "at rest": lambda: rest.encode(prefill.keys, prefill.values, positions, backend.rope),
        "read": lambda: rest.decode(written, shape, backend.rope, prefill.keys[0]),
    }
    rows = []
    for what in wanted:
        size = work["live"]().nbytes if what == "live" else len(written.to_bytes())
        ms, low, high = quartiles(wall_milliseconds(work[what], 5, 1))
        rows.append(
            {"tokens": tokens, "what": what, "full / cache": full / size,
             "prefill ms": prefill_ms, "ms": ms, "low": low, "high": high, "% of prefill": 100 * ms / prefill_ms,
             "MB/s": full / 1e3 / ms}
        )  # fmt: skip
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b" if gpu else "reference", choices=shapes.SHAPES)
    parser.add_argument("--tokens", default="4096,32768" if gpu else "4096")
    parser.add_argument("--layers", type=int, default=4, help="of a group, at most")
    parser.add_argument("--ratio", type=float, default=16, help="of caches at rest")
    parser.add_argument("--alike", type=int, default=1, help="neighbouring tokens, of which each is the mean")
    parser.add_argument("--what", default=",".join(WORK), help="some of these")
    parser.add_argument("--csv")
    options = parser.parse_args()
    print(f"{card()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    made = shapes.model(options.shape, device(), torch.bfloat16 if gpu else torch.float32)
    backend = TorchBackend.wrap(made, "bfloat16")
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        for tokens in map(int, options.tokens.split(",")):
            wanted = tuple(options.what.split(","))
            rows += measured(backend, tokens, options.layers, options.ratio, folder, wanted, options.alike)
    for row in rows:
        row |= {"alike": options.alike, "shape": options.shape, "card": card()}
    report("codec", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
