"""How many heads must hold a planted fact for it to be found: its sentence is evicted in all heads but some.

    python benchmarks/needle_heads.py model=reference
    python benchmarks/needle_heads.py --documents 8 --counts 1,2,9,18,45 model=smollm2

Further arguments are settings of `python -m pipeline`. KV heads are ranked by the attention that the sentence of an
answer gets in them while the answer is predicted on the full cache, mean over all questions. `held`: the strongest so
many keep the sentence and all others evict it; `evicted`: the other way round. A head that keeps it evicts as many
other tokens, drawn at random, so that all heads hold the same number. Writes <out>.csv and <out>.md.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.documents.base import Asked
from pipeline.job import prepare
from pipeline.run import hardware, loaded, placed
from pipeline.settings.compose import composed
from pipeline.stages.prefill import answer
from pipeline.statistics import estimate
from spectral_kv.attention import attention_mass, attention_weights
from spectral_kv.backends.base import Prefill
from spectral_kv.backends.measuring import MeasuredBackend
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import like, to_numpy

SINKS, RECENT = 4, 64  # never drawn to be evicted


def mass(backend: MeasuredBackend, prefill: Prefill, asked: Asked) -> np.ndarray:
    """Attention `[layers, kv_heads]` that the sentence gets while its answer is predicted on the full cache."""
    fed = np.concatenate([asked.question, asked.answer[:-1]])
    queries = backend.extend(backend.compress(prefill, None, Dense()), fed).queries
    found = []
    for layer, keys in zip(queries, prefill.keys, strict=True):
        weights = attention_weights(layer[:, -len(asked.answer) :], keys, backend.scaling)
        found.append(to_numpy(attention_mass(weights, len(keys)))[:, asked.places].sum(axis=-1))
    return np.stack(found)


def kept(tokens: int, places: np.ndarray, holds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tokens `[layers, kv_heads, kept]` of heads of which some, `[layers, kv_heads]`, hold those at `places`."""
    others = np.setdiff1d(np.arange(SINKS, tokens - RECENT), places)
    chosen = [
        np.delete(np.arange(tokens), rng.choice(others, len(places), replace=False) if held else places)
        for held in holds.ravel()
    ]
    return np.stack(chosen).reshape(*holds.shape, -1)


def found(backend: MeasuredBackend, prefill: Prefill, asked: Asked, tokens: np.ndarray) -> bool:
    """Whether a cache of the tokens `[layers, kv_heads, kept]` gives the answer."""
    chosen = [like(layer, keys) for layer, keys in zip(tokens, prefill.keys, strict=True)]
    said = answer(backend, backend.compress(prefill, chosen, Dense()), asked.question, len(asked.answer))
    return said == asked.answer.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING", help="settings as for python -m pipeline")
    parser.add_argument("--documents", type=int, default=16, help="prompts, of four questions each")
    parser.add_argument("--tokens", type=int, default=2048, help="length of a prompt")
    parser.add_argument("--counts", default="1,2,4,8", help="heads that hold or evict the sentence")
    parser.add_argument("--out", type=Path, default=Path("outputs/needle_heads"), help="path without ending")
    arguments = parser.parse_intermixed_args()
    given = ["method=full", "document=needles", f"document.tokens={arguments.tokens}", "phase=[retrieval]"]
    job = prepare(composed([*given, f"document.count={arguments.documents}", *arguments.overrides]))
    _, backend = loaded(job.settings, job.checkpoint)
    prefills, masses = [], []
    for number, (window, lookups) in enumerate(zip(job.windows, job.lookups, strict=True), 1):
        prefills.append(backend.prefill(window[: arguments.tokens], 0, job.settings.backend.chunk))
        masses += [mass(backend, prefills[-1], asked) for asked in lookups]
        print(f"prompt {number} of {len(job.windows)}", flush=True)
    strength = np.mean(masses, axis=0)
    ranked = np.argsort(-strength, axis=None)
    rng, rows = np.random.default_rng(0), []
    counts = [int(count) for count in arguments.counts.split(",")]
    for kind, count in [("held", strength.size), *((kind, count) for kind in ("held", "evicted") for count in counts)]:
        holds = np.full(strength.size, kind == "evicted")
        holds[ranked[:count]] = kind == "held"
        holds = holds.reshape(strength.shape)
        recall = [
            np.mean([found(backend, p, one, kept(arguments.tokens, one.places, holds, rng)) for one in lookups])
            for p, lookups in zip(prefills, job.lookups, strict=True)
        ]
        value = estimate(np.array(recall))
        share = float(strength.ravel()[ranked[:count]].sum() / strength.sum())
        rows.append(
            {
                "model": job.settings.model.title, "tokens": arguments.tokens, "heads": strength.size, "kind": kind,
                "count": count, "their share of the attention": share, "recall": value.mean, "recall_low": value.low,
                "recall_high": value.high, "questions": sum(map(len, job.lookups)),
                "hardware": hardware(placed(job.settings.backend)[0]), "hash_document": job.document_hash,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out.with_suffix(".csv"), index=False, float_format="%.4g")
    shown = table.drop(columns=["hardware", "hash_document"])
    arguments.out.with_suffix(".md").write_text(shown.to_markdown(index=False, floatfmt=".2f") + "\n")


if __name__ == "__main__":
    main()
