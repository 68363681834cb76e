"""Several turns on one cache, which never holds more than its budget and the last turn: python examples/chat.py"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectral_kv

folder = spectral_kv.reference_model()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
cache = spectral_kv.cache(model, "keydiff", budget=spectral_kv.Budget(96, sinks=4, recent=16))

turns = (
    "The pass key of the amber fox is 31415.\nThe access code of the silver river is 27182.\n" + "Nothing else.\n" * 30,
    "What is the pass key of the amber fox? The pass key of the amber fox is",
    "What is the access code of the silver river? The access code of the silver river is",
)
text = tokenizer.bos_token
for turn in turns:
    text += turn
    inputs = tokenizer(text, return_tensors="pt")  # all that was said: what the cache has seen is not run again
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(ids[0]) + "\n"
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]).partition("\n")[0].strip()
    print(f"{answer}   ({cache.position} tokens seen, {cache.held} held)")
