"""Peak memory of running and compressing a long prompt, beside the bytes of its full cache.

    python benchmarks/prefill_memory.py
    python benchmarks/prefill_memory.py --device cpu --tokens 2048 --hidden 256 --layers 4 --chunks 512

The model has the shape of Qwen2.5-0.5B and random weights. Three numbers for every way of feeding the prompt:

- `cache`: the most that the layers of the cache hold at once, keys and values of the layer that is being read included,
  looked at whenever a layer has been read and before it evicts;
- `scoring`: on a GPU, the most that is allocated while a layer scores and evicts, above what was allocated before;
- `all`: on a GPU, the most that is allocated in the whole run above the weights: cache, scoring, activations.

`full` is what the cache of the whole prompt has to hold. The same is fed to transformers' own DynamicCache for
comparison.
"""

import argparse

import torch
from tabulate import tabulate
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import spectral_kv
from spectral_kv.backends.torch_generation import GenerationLayer

MB = 1e6


class Watched:
    """Looks at the cache between the attention of a layer and its eviction."""

    def __init__(self, cache, device: torch.device):
        self.cache, self.device, self.most, self.scoring = cache, device, 0, 0
        self.before = GenerationLayer.attended

    def __enter__(self):
        def attended(layer, queries, mask):
            self.most = max(self.most, sum(map(held, self.cache.layers)))
            if self.device.type == "cuda":
                start, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.before(layer, queries, mask)
            if self.device.type == "cuda":
                self.scoring = max(self.scoring, torch.cuda.max_memory_allocated() - start)
                self.peak = max(peak, torch.cuda.max_memory_allocated(), getattr(self, "peak", 0))

        GenerationLayer.attended = attended
        return self

    def __exit__(self, *_):
        GenerationLayer.attended = self.before


def held(layer) -> int:
    """Bytes of keys and values, those of a prompt that is not put away yet included."""
    return layer.nbytes + sum(x.nbytes for x in layer._prompt or ())


def fed(model, ids: torch.Tensor, chunk: int | None, settings: dict) -> dict:
    """A row of the table."""
    cuda = ids.device.type == "cuda"
    cache = spectral_kv.cache(model, **settings)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    with Watched(cache, ids.device) as watched:
        cache.prefill(ids, chunk=chunk)
    row = {"fed": chunk or "whole", "cache": watched.most, "held": cache.nbytes}
    if cuda:
        whole = max(watched.peak, torch.cuda.max_memory_allocated()) - start
        row |= {"scoring": watched.scoring, "all": whole}
    return row


def plainly(model, ids: torch.Tensor, chunk: int | None) -> dict:
    """The row of transformers' own cache."""
    cuda, cache = ids.device.type == "cuda", DynamicCache()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    with torch.no_grad():
        for piece in ids.split(chunk or ids.shape[1], dim=1):
            model(piece, past_key_values=cache, logits_to_keep=1)
    size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    row = {"fed": f"{chunk or 'whole'}, DynamicCache", "cache": size, "held": size}
    return row | ({"all": torch.cuda.max_memory_allocated() - start} if cuda else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896, help="width; 14 query and 2 KV heads of 64 at 896")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument(
        "--intermediate", type=int, default=4864, help="width of the MLP, which the cache has no part of"
    )
    parser.add_argument("--method", default="fourier")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--chunks", default="2048,whole", help="tokens fed at once, or `whole`")
    parser.add_argument("--plain", action="store_true", help="feed transformers' DynamicCache too")
    arguments = parser.parse_args()
    config = Qwen2Config(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden, intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64, num_key_value_heads=2,
        max_position_embeddings=max(32768, arguments.tokens), tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    with device:
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype).eval()
    ids = torch.randint(0, config.vocab_size, (1, arguments.tokens), device=device)
    settings = dict(method=arguments.method, budget=arguments.budget)
    if device.type == "cuda":
        spectral_kv.cache(model, **settings).prefill(ids[:, :1024])  # tables and kernels are made
    full = arguments.layers * 2 * 2 * arguments.tokens * 64 * dtype.itemsize
    chunks = [None if chunk == "whole" else int(chunk) for chunk in arguments.chunks.split(",")]
    rows = [fed(model, ids, chunk, settings) for chunk in chunks]
    if arguments.plain:
        model.set_attn_implementation("sdpa")
        rows += [plainly(model, ids, chunk) for chunk in chunks]
    for row in rows:
        row["full"] = full
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{arguments.tokens} tokens, {arguments.layers} layers, {arguments.method}, {arguments.dtype}, {where}; MB")
    print(tabulate([{k: v if k == "fed" else v / MB for k, v in row.items()} for row in rows], "keys", floatfmt=".1f"))


if __name__ == "__main__":
    main()
