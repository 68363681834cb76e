"""Attention of one new token to cached rows: PyTorch's kernels, ours over 16 bits, ours over TurboQuant codes.

    python -m benchmarks.attention
    python -m benchmarks.attention --heads 32x8x128 --sizes 32768x1,32768x16 --bits 4,3,2 --csv attention.csv

Microseconds a layer, of calls captured one after another over so many buffers that they don't stay in the cache of the
chip. `error` is relative to attention to the decoded rows in float64.
"""

import argparse
import statistics
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.clock import Row, captured, card, copy_bandwidth, device, milliseconds, report
from benchmarks.shapes import coded_cache
from spectral_kv.engine.held import HeldCoded
from spectral_kv.engine.rows import DenseRows

SPREAD = 1.2e9  # bytes of 16-bit rows over which calls rotate
KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def microseconds(calls: list) -> float:
    """A call, of calls captured one after another; by the clock where nothing can be captured."""

    def run() -> None:
        for call in calls:
            call()

    replay = captured(run) if torch.cuda.is_available() else run
    return 1e3 * statistics.median(milliseconds(replay, 9)) / len(calls)


def model_like(query_heads: int, kv_heads: int, dim: int, layers: int) -> SimpleNamespace:
    """What `coded_cache` reads of a model."""
    config = SimpleNamespace(num_key_value_heads=kv_heads, num_attention_heads=query_heads, num_hidden_layers=layers,
                             hidden_size=query_heads * dim)  # fmt: skip
    return SimpleNamespace(config=config, device=torch.device(device()), dtype=torch.bfloat16)


def measured(heads: tuple[int, int, int], tokens: int, batch: int, bits: list[int], bandwidth: float) -> list[Row]:
    query_heads, kv_heads, dim = heads
    where, scale = device(), dim**-0.5
    nbytes = 2 * batch * kv_heads * tokens * dim * 2
    count = max(1, min(24, round(SPREAD / nbytes)))
    q = torch.randn(batch, query_heads, 1, dim, device=where, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, 1, dim, device=where, dtype=torch.bfloat16) for _ in range(2))
    shape = (batch, kv_heads, tokens + 64, dim)
    buffers = [tuple(torch.randn(shape, device=where, dtype=torch.bfloat16) for _ in range(2)) for _ in range(count)]
    lengths = torch.full((batch, kv_heads), tokens, device=where)
    times = {}
    if torch.cuda.is_available():
        for name, kernel in KERNELS.items():

            def sdpa(keys, values, kernel=kernel):
                with sdpa_kernel(kernel):
                    keys, values = keys[:, :, :tokens], values[:, :, :tokens]
                    return scaled_dot_product_attention(q, keys, values, enable_gqa=True)

            times[name] = microseconds([lambda b=b, f=sdpa: f(*b) for b in buffers])
    dense = [DenseRows(*b, lengths, query_heads) for b in buffers]
    times["dense"] = microseconds([lambda r=r: r.attend(q, k, v, scale) for r in dense])
    best = min(times.values())
    row = {"query heads": query_heads, "kv heads": kv_heads, "dim": dim, "tokens": tokens, "batch": batch}
    rows = [{**row, "kernel": name, "us": us, "16 bit / this": best / us, "x floor": us * bandwidth / nbytes / 1e6}
            for name, us in times.items()]  # fmt: skip
    del dense, buffers
    for b in bits:
        cache = coded_cache(model_like(*heads, min(24, 2 * count)), tokens, batch, b)
        held = HeldCoded(cache.layers, query_heads, tokens + 64, None, torch.bfloat16, captured=False)
        us = microseconds([lambda r=r: r.attend(q, k, v, scale) for r in held.rows])
        error = deviation(held, cache, q, k, v, scale) if batch * tokens <= 65536 else None
        rows.append({**row, "kernel": f"{b} bit", "us": us, "16 bit / this": best / us,
                     "x floor": us * bandwidth / cache.layers[0].nbytes / 1e6, "error": error})  # fmt: skip
        del cache, held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def deviation(held: HeldCoded, cache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
    """Relative error against attention to what the codes stand for, in float64."""
    got = held.rows[0].attend(q, k, v, scale).double()
    stored = cache.layers[0].stored
    decoded = stored.codec.decode(stored.coded)
    parts = zip(stored.first, decoded, stored.recent, (k, v), strict=True)
    keys, values = (torch.cat([x.double() for x in part], dim=-2) for part in parts)
    group = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    want = (scale * q.double() @ keys.mT).softmax(-1) @ values
    return float((got - want).norm() / want.norm())


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", default="14x2x64,32x8x128" if gpu else "4x2x64", help="query x kv x dim, ...")
    parser.add_argument("--sizes", default="4096x1,32768x1,32768x16" if gpu else "512x1", help="tokens x batch, ...")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--csv")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{card()}, copies {bandwidth / 1e12:.3f} TB/s, torch {torch.__version__}")
    rows: list[Row] = []
    for heads in options.heads.split(","):
        for size in options.sizes.split(","):
            tokens, batch = map(int, size.split("x"))
            bits = [int(b) for b in options.bits.split(",")]
            rows += measured(tuple(map(int, heads.split("x"))), tokens, batch, bits, bandwidth)
    for row in rows:
        row["card"] = card()
    report("attention", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
