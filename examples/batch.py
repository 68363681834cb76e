"""Prompts of different lengths together, each as it would be alone: python examples/batch.py"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_kv

folder = spectral_kv.reference_model()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token

prompts = [
    tokenizer.bos_token + "The assignment statement binds names to values. " * 20,
    tokenizer.bos_token + "A list is",
    tokenizer.bos_token + "Remember this: the room number of the iron crow is 16180.\n" + "A for loop goes on.\n" * 12
    + "What is the room number of the iron crow? The room number of the iron crow is",
]  # fmt: skip
inputs = tokenizer(prompts, padding=True, return_tensors="pt")
cache = spectral_kv.cache(model, "keydiff", budget=64)
together = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
for prompt, ids in zip(prompts, together[:, inputs.input_ids.shape[1] :], strict=True):
    alone = tokenizer(prompt, return_tensors="pt")
    cache = spectral_kv.cache(model, "keydiff", budget=64)
    same = model.generate(**alone, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(same[0, alone.input_ids.shape[1] :]) == tokenizer.decode(ids)
    print(f"{alone.input_ids.shape[1]:4} tokens: {tokenizer.decode(ids)!r}")
