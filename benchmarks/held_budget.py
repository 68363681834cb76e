"""Bytes of a cache at every step of a long generation, beside those of its budget and interval.

    python benchmarks/held_budget.py
    python benchmarks/held_budget.py --tokens 10000 --layers 2 --every 16

The embedded model (or its first layers) generates from a prompt of 1024 tokens; after every step the bytes of all that
must live and of the room to grow are counted. `allowed` is what budget + every tokens take in this storage, 4 bytes for
the position of every token and KV head and, with decode=append, 4 more for its place. The exit status is 1 if a step
exceeds it.
"""

import argparse
import time

import numpy as np
import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

import spectral_kv


class Sizes(StoppingCriteria):
    """Asked after every step; stops nothing."""

    def __init__(self, cache):
        self.cache, self.nbytes, self.held = cache, [], []

    def __call__(self, input_ids, scores, **kwargs):
        self.nbytes.append(self.cache.allocated)
        self.held.append(self.cache.held)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--methods", default="fourier")
    parser.add_argument("--storage", default="dense")
    parser.add_argument("--decode", default="rescore,append")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--every", type=int, default=128)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        spectral_kv.reference_model(), num_hidden_layers=arguments.layers, dtype=torch.float32
    ).to(arguments.device)
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, model.config.vocab_size, (1, 1024))).to(model.device)
    rows = []
    for method in arguments.methods.split(","):
        for decode in arguments.decode.split(","):
            cache = spectral_kv.cache(
                model, method, arguments.budget, arguments.storage, every=arguments.every, decode=decode
            )
            seen, start = Sizes(cache), time.perf_counter()
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=arguments.tokens,
                do_sample=True, stopping_criteria=StoppingCriteriaList([seen]),
            )  # fmt: skip
            shape, storage = cache.compressor.backend.shape, cache.compressor.storage
            allowed = storage.nbytes(arguments.budget + arguments.every, shape.kv_heads, shape.dim, 4)
            allowed += 4 * shape.kv_heads * (arguments.budget + arguments.every)
            places = 4 * shape.kv_heads * arguments.budget if decode == "append" else 0
            rows.append({
                "method": method, "decode": decode, "steps": len(seen.nbytes), "most held": max(seen.held),
                "most bytes": max(seen.nbytes), "allowed": arguments.layers * (allowed + places),
                "last bytes": seen.nbytes[-1], "s": round(time.perf_counter() - start, 1),
            })  # fmt: skip
    print(tabulate(rows, "keys"))
    raise SystemExit(int(any(row["most bytes"] > row["allowed"] for row in rows)))


if __name__ == "__main__":
    main()
