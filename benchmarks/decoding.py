"""A decoding step over the full cache, over 512 kept tokens and over all tokens in codes, eager and in a graph.

    python -m benchmarks.decoding
    python -m benchmarks.decoding --shape llama-3.1-8b --sizes 32768x8 --csv decoding.csv

Weights and cached rows are random: speed depends on shapes alone. `ragged` are as many kept tokens in the mean, every
head holding another number. Every cache goes through the same steps and the same attention. `eager` is what
`engine=eager` does, forward passes of transformers over the library's cache; `planned` the same passes with the
attention that torch prefers, which on recent GPUs is planned anew for every length; `modules` the same modules in a
graph; `blocks` joined and compiled blocks in a graph. `x floor` is the time of a step over the time in which the device
copies the bytes that the step has to read once, weights and live cache, at the bandwidth of a large copy measured in
the same run. Steps take turns in every round, but for eager ones; medians over rounds, with quartiles.
"""

import argparse
import gc
import logging
from collections.abc import Callable
from functools import partial

import torch
from transformers import Cache

from benchmarks import shapes
from benchmarks.clock import Row, card, copy_bandwidth, device, milliseconds, quartiles, report, wall_milliseconds
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.engine.decoding import Engine
from spectral_kv.engine.forward import Modules
from spectral_kv.engine.held import Held, HeldCoded, HeldDense
from spectral_kv.engine.held_runs import HeldRuns
from spectral_kv.engine.step import Step
from spectral_kv.storage.turboquant import TurboQuantStorage

ROOM = 128  # rows
WINDOW = TurboQuantStorage().sinks + TurboQuantStorage().recent
STEPS, ROUNDS = 16, 7  # steps of a timing, and how often all take turns
EAGER_STEPS, EAGER_ROUNDS = 8, 4


class Turn:
    """One step over one cache, timed in turn with others."""

    def __init__(self, cache: str, kind: str, held: Held, step: Step, seen: int, nbytes: int):
        self.cache, self.kind, self.held, self.step, self.seen, self.nbytes = cache, kind, held, step, seen, nbytes
        self.times: list[float] = []

    def time(self) -> None:
        def run() -> None:
            for _ in range(STEPS):
                self.step.run()

        self.held.counters.start(self.seen, self.held.dense)
        self.times += [ms / STEPS for ms in milliseconds(run, 1, 0)]


def caches(made: torch.nn.Module, tokens: int, batch: int, kept: int, bits: list[int]) -> dict[str, Callable]:
    """How to make the caches that are compared."""
    made_up = {
        "full": lambda: shapes.dense_cache(made, tokens, tokens, batch),
        f"{kept} kept": lambda: shapes.dense_cache(made, kept, tokens, batch),
        f"{kept} ragged": lambda: shapes.ragged_cache(made, kept, tokens, batch),
    }
    return made_up | {f"{b} bit": lambda b=b: shapes.coded_cache(made, tokens, batch, b) for b in bits}


def graphs(
    engine: Engine, tokens: int, batch: int, kept: int, bits: list[int]
) -> list[tuple[str, str, int, list, float]]:
    """Cache, kind of step, bytes of the cache, milliseconds a step and seconds of the capture."""
    made, best = engine.model, engine.forward()
    modules, capture = Modules(made), device() == "cuda"
    turns: list[Turn] = []
    for name, make in caches(made, tokens, batch, kept, bits).items():
        cache = make()
        nbytes, rows = cache.nbytes, max(layer.held for layer in cache.layers)
        kind = HeldCoded if "bit" in name else HeldRuns if "ragged" in name else HeldDense
        held = kind(cache.layers, made.config.num_attention_heads, rows + ROOM, best, made.dtype, capture)
        turns.append(Turn(name, "modules" if isinstance(best, Modules) else "blocks", held, held.step, tokens, nbytes))
        if best is not modules and "bit" not in name and not isinstance(best, Modules):
            step = Step(modules, held.rows, held.counters, batch, ROOM, capture)
            turns.append(Turn(name, "modules", held, step, tokens, nbytes))
        del cache
    for _ in range(ROUNDS + 1):
        for turn in turns:
            turn.time()
        turns.reverse()
    return [(t.cache, t.kind, t.nbytes, t.times[1:], t.step.capture_seconds) for t in turns]


def eager(engine: Engine, tokens: int, batch: int, kept: int) -> list[tuple[str, str, int, list, None]]:
    """The same by forward passes of transformers over the library's cache, on the host's clock."""
    backend = TorchBackend.wrap(engine.model, engine="eager")
    results = []
    for name, make in caches(engine.model, tokens, batch, kept, []).items():
        cache = make()
        cache.reserve(ROOM)
        kinds = {"eager": backend.generate} | ({} if "ragged" in name else {"planned": partial(planned, engine.model)})
        for kind, steps in kinds.items():
            times = wall_milliseconds(partial(steps, cache, 7, EAGER_STEPS), EAGER_ROUNDS, 1)
            results.append((name, kind, cache.nbytes, [ms / EAGER_STEPS for ms in times], None))
        del cache
    return results


def planned(model: torch.nn.Module, cache: Cache, token: int, count: int) -> None:
    """Forward passes, the attention being torch's choice."""
    ids = torch.full((cache.batch, 1), token, device=model.device)
    for _ in range(count):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)


def table(name: str, made: torch.nn.Module, tokens: int, batch: int, measured: list, bandwidth: float) -> list[Row]:
    weights, rows = shapes.weight_bytes(made), []
    medians = {(cache, kind): quartiles(times)[0] for cache, kind, _, times, _ in measured}
    for cache, kind, nbytes, times, capture in sorted(measured, key=lambda m: (m[1], m[0])):
        ms, low, high = quartiles(times)
        floor = 1e3 * (weights + nbytes) / bandwidth
        over = {name: medians.get((cache, name)) for name in ("eager", "planned")}
        rows.append(
            {"shape": name, "tokens": tokens, "batch": batch, "cache": cache, "step": kind, "ms": ms, "low": low,
             "high": high, "x floor": ms / floor, "full / this": medians["full", kind] / ms,
             **{f"{other} / this": other_ms and other_ms / ms for other, other_ms in over.items()},
             "tokens / s": 1e3 * batch / ms, "capture s": capture}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", default="qwen2.5-0.5b" if torch.cuda.is_available() else "tiny", choices=shapes.SHAPES
    )
    parser.add_argument(
        "--sizes",
        default="4096x1,32768x16" if torch.cuda.is_available() else "256x1",
        help="tokens x batch, comma-separated",
    )
    parser.add_argument("--kept", type=int, default=512 if torch.cuda.is_available() else 128)
    parser.add_argument("--bits", default="4", help="of codes, comma-separated, or none")
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--csv")
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    bits = [] if options.bits == "none" else [int(b) for b in options.bits.split(",")]
    fewest = min(tokens for tokens, _ in sizes)
    if fewest < options.kept:
        parser.error(f"--kept {options.kept} of {fewest} tokens: keep fewer, or give more tokens by --sizes")
    if bits and fewest <= WINDOW:
        parser.error(f"of {fewest} tokens none is in codes, {WINDOW} stay exact: give more by --sizes, or --bits none")
    logging.basicConfig(level=logging.INFO)
    bandwidth = copy_bandwidth()
    print(f"{card()}, copies {bandwidth / 1e12:.3f} TB/s, torch {torch.__version__}")
    rows: list[Row] = []
    engine = Engine(shapes.model(options.shape, device()))
    for tokens, batch in sizes:
        measured = graphs(engine, tokens, batch, options.kept, bits)
        gc.collect()
        torch.cuda.empty_cache()
        if not options.no_eager:
            measured += eager(engine, tokens, batch, options.kept)
            gc.collect()
            torch.cuda.empty_cache()
        rows += table(options.shape, engine.model, tokens, batch, measured, bandwidth)
    for row in rows:
        row["card"] = card()
    report("decoding", rows, options.csv)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
