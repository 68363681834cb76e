"""A long document, compressed once, saved, and asked several questions: python examples/long_document.py [tokens]"""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_kv

folder, tokens = spectral_kv.reference_model(), int(sys.argv[1]) if len(sys.argv) > 1 else 2000
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)

lines = tokenizer.decode(tokenizer("\n".join(topics.values())[: 8 * tokens]).input_ids[:tokens]).split("\n")
facts = {"amber fox": "31415", "silver river": "27182", "golden crow": "16180"}
for number, (name, key) in enumerate(facts.items(), start=1):
    lines.insert(number * len(lines) // 4, f"Remember this: the pass key of the {name} is {key}.")
document = tokenizer(tokenizer.bos_token + "\n".join(lines), return_tensors="pt").input_ids

with tempfile.TemporaryDirectory() as place:
    path = Path(place) / "document.safetensors"
    cache = spectral_kv.cache(model, "keydiff", budget=tokens // 4)
    with torch.no_grad():
        model(document, past_key_values=cache, logits_to_keep=1)
    cache.save(path, tokens=document)
    print(f"{document.shape[1]} tokens, {cache.held} kept: {path.stat().st_size / 1e6:.1f} MB")
    for name, key in facts.items():
        question = f"\nWhat is the pass key of the {name}? The pass key of the {name} is"
        ids = torch.cat([document, tokenizer(question, return_tensors="pt").input_ids], dim=1)
        cache = spectral_kv.load(path, model, tokens=document, method="full")  # evicts nothing more
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        print(f"{name}: {tokenizer.decode(ids[0, -6:]).strip()} (it is {key})")
