"""The numbers of the model card.

    python -m pipeline.reference_model.measure nll
    python -m pipeline.reference_model.measure needles --length 4096
    python -m pipeline.reference_model.measure needles --length 4096 --kind multikey
    python -m pipeline.reference_model.measure needles --length 4096 --kind chain
    python -m pipeline.reference_model.measure sinks

The text is Python's language reference, which the model never saw as CPython 3.11 has it. Further arguments are
settings as for `python -m pipeline`, so that any model can be measured the same way.
"""

import argparse
import itertools
import sys

import numpy as np
import pandas as pd

from pipeline.documents.lookups import Lookup, chain, fact, needles, spliced
from pipeline.job import Job, prepare
from pipeline.run import loaded
from pipeline.settings.cli import reporting
from pipeline.settings.compose import composed
from pipeline.show.progress import progress
from pipeline.show.summary import spread
from pipeline.statistics import estimate
from spectral_kv.attention import attention_weights
from spectral_kv.backends.base import Backend
from spectral_kv.metrics.prediction import log_softmax, negative_log_likelihood
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import like, to_numpy

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)
DEPTHS = np.linspace(0.0, 1.0, 11)


def nll_by_position(job: Job, backend: Backend) -> pd.DataFrame:
    """Mean negative log-likelihood (nats) of held-out tokens by their position in a full context, over all windows."""
    rows = []
    for window in progress(job.windows, "nll"):
        empty = backend.compress(backend.prefill(window[:1], observe=1), None, Dense())
        logits = backend.extend(empty, window[1:]).logits
        rows.append(to_numpy(negative_log_likelihood(log_softmax(logits[:-1]), like(window[2:], logits))))
    nll = np.stack(rows)  # [windows, position - 2]
    table = []
    for low, high in itertools.pairwise(EDGES):
        part = nll[:, max(low - 2, 0) : high - 2]
        if part.shape[1]:
            table.append({"position": f"{low}-{high}", "nats a token": spread(estimate(part.mean(axis=1)), "{:.3f}")})
    return pd.DataFrame(table)


def planted(job: Job, window: np.ndarray, items: list[Lookup], depths: list[float], asked: Lookup) -> np.ndarray:
    """A prompt of the window's length: statements at their depths (0 first, 1 last), the question at the end."""
    encode = job.checkpoint.tokenizer.encode
    statements = [np.array(encode(f"\n{s}\n").ids) for item in items for s in item.statements]
    question = np.array(encode(f"\n{asked.question}").ids)
    text = window[1 : len(window) - sum(map(len, statements)) - len(question)]
    places = [int(d * len(text)) for d in depths]
    return np.concatenate([window[:1], spliced(text, statements, places), question])


def recall(job: Job, backend: Backend, kind: str, repeats: int) -> pd.DataFrame:
    """Share of questions answered exactly by greedy decoding, by depth of the needle."""
    rows = []
    trials = [(depth, repeat) for depth in DEPTHS for repeat in range(repeats)]
    for number, (depth, repeat) in enumerate(progress(trials, f"needles, {kind}")):
        rng = np.random.default_rng([7, repeat, int(100 * depth)])
        window = job.windows[number % len(job.windows)][: job.settings.documents.tokens]
        if kind == "single":
            items, depths = [fact(rng)], [depth]
        elif kind == "multikey":  # the wanted needle at `depth`, three others about the same attribute anywhere
            items = needles(rng, 4)
            depths = [depth, *rng.random(3)]
        else:
            items = [chain(rng, hops=2)]
            depths = sorted([depth, *rng.random(2)])
        asked = items[0]
        if kind == "multikey":
            order = np.argsort(depths, kind="stable")
            items, depths = [items[i] for i in order], [depths[i] for i in order]
        prompt = planted(job, window, items, depths, asked)
        cache = backend.compress(backend.prefill(prompt[:-1], observe=1), None, Dense())
        wanted = job.checkpoint.tokenizer.encode(f" {asked.answer}.").ids
        rows.append({"depth": depth, "found": backend.generate(cache, int(prompt[-1]), len(wanted)) == wanted})
    table = pd.DataFrame(rows).groupby("depth")["found"].agg(["sum", "count"]).reset_index()
    total = pd.DataFrame([{"depth": "all", "sum": table["sum"].sum(), "count": table["count"].sum()}])
    table["depth"] = table["depth"].map("{:.0%}".format)
    table = pd.concat([table, total])
    table["recall"] = (table["sum"] / table["count"]).map("{:.0%}".format)
    return table.rename(columns={"sum": "found", "count": "asked"})


def sink_mass(job: Job, backend: Backend) -> pd.DataFrame:
    """Attention mass that the queries after the prompt put on its first four tokens, by layer."""
    tokens = job.settings.documents.tokens
    shares = []
    for window in progress(job.windows, "sinks"):
        prefill = backend.prefill(window[:tokens], observe=1)
        queries = backend.extend(backend.compress(prefill, None, Dense()), window[tokens:]).queries
        weights = [
            to_numpy(attention_weights(q, k, backend.scaling)) for q, k in zip(queries, prefill.keys, strict=True)
        ]
        shares.append([[w[..., :1].sum(-1).mean(), w[..., :4].sum(-1).mean()] for w in weights])
    shares = np.array(shares)  # [documents, layers, (first, first four)]
    table = [
        {
            "layer": str(layer),
            "first token": spread(estimate(shares[:, layer, 0]), "{:.3f}"),
            "first four": spread(estimate(shares[:, layer, 1]), "{:.3f}"),
        }
        for layer in range(shares.shape[1])
    ]
    mean = {
        "layer": "mean",
        "first token": f"{shares[..., 0].mean():.3f}",
        "first four": f"{shares[..., 1].mean():.3f}",
    }
    return pd.DataFrame([*table, mean])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nll", "needles", "sinks"])
    parser.add_argument("overrides", nargs="*", help="settings as for python -m pipeline")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a needle test, answer included")
    parser.add_argument("--kind", choices=["single", "multikey", "chain"], default="single")
    parser.add_argument("--repeats", type=int, default=5, help="questions a depth")
    arguments = parser.parse_intermixed_args()
    sizes = {"nll": (8190, 2, 12), "needles": (arguments.length - 8, 8, 5), "sinks": (4096, 64, 8)}[arguments.what]
    names = ("document.tokens", "document.continuation", "document.count")
    settings = [
        "method=full",
        "phase=perturbation",
        "phase.perturbation.positions=2",
        *(f"{n}={v}" for n, v in zip(names, sizes, strict=True)),
    ]
    with reporting(sys.argv[1:]):
        job = prepare(composed([*settings, *arguments.overrides]))
        _, backend = loaded(job.settings, job.checkpoint)
        if arguments.what == "nll":
            table = nll_by_position(job, backend)
        elif arguments.what == "needles":
            table = recall(job, backend, arguments.kind, arguments.repeats)
        else:
            table = sink_mass(job, backend)
        print(table.to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
