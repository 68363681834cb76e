"""Decoding for as long as you like in the memory of a few hundred tokens: python examples/held_budget.py [tokens]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import spectral_kv

folder, tokens = spectral_kv.reference_model(), int(sys.argv[1]) if len(sys.argv) > 1 else 1000
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(tokenizer.bos_token + "The Python language\n\n", return_tensors="pt")
settings = dict(max_new_tokens=tokens, do_sample=True, pad_token_id=0, eos_token_id=None)

for name in ("all tokens", "a budget"):
    cache = DynamicCache() if name == "all tokens" else spectral_kv.cache(model, "streaming", budget=128, every=64)
    torch.manual_seed(0)
    ids = model.generate(**inputs, past_key_values=cache, **settings)
    if name == "all tokens":
        size = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    else:
        size = cache.nbytes
    print(f"{name}: {ids.shape[1]} tokens, {size / 1e6:.2f} MB, ends {tokenizer.decode(ids[0, -12:])!r}")
