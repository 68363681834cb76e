"""What feeding a prompt in chunks costs: the budget is held after every chunk, instead of chosen once from all tokens.

    python benchmarks/chunked_prefill.py
    python benchmarks/chunked_prefill.py --methods fourier --chunks whole,1024 --count 2

On windows of the language reference, embedded model: AOP of 64 positions after the prompt, KL to the full cache over
255 tokens, and the share of planted facts that are answered. Every number is the mean over windows; behind it, of a
chunked prompt, the difference to the whole one with the standard error of that difference.
"""

import argparse

import numpy as np
import torch
from tabulate import tabulate
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import spectral_kv
from pipeline.documents.needles import Needles
from pipeline.documents.pydoc import Pydoc
from spectral_kv.attention import attention_output
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import kl_divergence, log_softmax
from spectral_kv.storage.dense import Dense

POSITIONS, SCORED = 64, 255


def again(model, cache):
    """A copy of a cache that evicts nothing more."""
    copy = spectral_kv.cache(model, "full", cache.compressor.budget)
    copy.restore(cache.tensors(), cache.position, [cache.layers[0].sequences[0].seen])
    return copy


def predicted(model, backend, windows, tokens: int, settings) -> dict:
    """AOP and KL `[windows]` of every setting `(method, chunk, budget)`."""
    found = {setting: [] for setting in settings}
    for window in windows:
        prompt = torch.from_numpy(window[None, :tokens]).to(model.device)
        rest = torch.from_numpy(window[None, tokens : tokens + SCORED]).to(model.device)
        prefill = backend.prefill(window[:tokens], 0)
        extension = backend.extend(backend.compress(prefill, None, Dense()), window[tokens : tokens + SCORED])
        queries = [q[:, :POSITIONS] for q in extension.queries]
        wholes = [
            attention_output(q, k, v, backend.scaling)
            for q, k, v in zip(queries, prefill.keys, prefill.values, strict=True)
        ]
        for method, chunk, budget in settings:
            cache = spectral_kv.cache(model, method, budget)
            cache.prefill(prompt, chunk=chunk)
            aop = []
            for layer, q, whole in zip(cache.layers, queries, wholes, strict=True):
                keys, values = (x[0] for x in layer.sequences[0].stored.load())
                kept = attention_output(q, keys, values, backend.scaling)
                aop.append(float(attention_output_perturbation(kept, whole).mean()))
            with torch.no_grad():
                logits = model(rest, past_key_values=cache).logits[0]
            kl = kl_divergence(log_softmax(extension.logits), log_softmax(logits)).mean()
            found[method, chunk, budget].append((np.mean(aop), float(kl)))
    return {setting: np.array(values) for setting, values in found.items()}


def recalled(model, windows, lookups, tokens: int, settings) -> dict:
    """Share of the facts of every window that are answered, `[windows]`."""
    found = {setting: [] for setting in settings}
    for window, asked in zip(windows, lookups, strict=True):
        prompt = torch.from_numpy(window[None, :tokens]).to(model.device)
        for method, chunk, budget in settings:
            cache, right = spectral_kv.cache(model, method, budget), []
            cache.prefill(prompt, chunk=chunk)
            for one in asked:
                ids = torch.cat([prompt, torch.from_numpy(one.question[None]).to(model.device)], dim=1)
                said = model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=again(model, cache),
                    max_new_tokens=len(one.answer), do_sample=False,
                )  # fmt: skip
                right.append(said[0, ids.shape[1] :].tolist() == one.answer.tolist())
            found[method, chunk, budget].append(np.mean(right))
    return {setting: np.array(values) for setting, values in found.items()}


def cell(values: np.ndarray, whole: np.ndarray | None) -> str:
    """The mean, and the difference to the whole prompt's with its standard error."""
    if whole is None:
        return f"{values.mean():.3f}"
    difference = values - whole
    return f"{values.mean():.3f} ({difference.mean():+.3f} +- {difference.std(ddof=1) / len(values) ** 0.5:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", default="fourier,wavelet,wavelet_tri,snapkv,keydiff,streaming")
    parser.add_argument("--chunks", default="whole,2048,1024,512")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--count", type=int, default=8, help="windows, of text and of text with planted facts each")
    arguments = parser.parse_args()
    folder = spectral_kv.reference_model()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(arguments.device).eval()
    model.generation_config.eos_token_id = None
    sizes = dict(tokens=arguments.tokens, continuation=640, count=arguments.count)
    bos, documents, needles = model.config.bos_token_id, Pydoc(**sizes), Needles(**sizes, form="plain")
    chunks = [None if chunk == "whole" else int(chunk) for chunk in arguments.chunks.split(",")]
    settings = [(method, chunk, arguments.budget) for method in arguments.methods.split(",") for chunk in chunks]
    backend = TorchBackend.wrap(model)
    scores = predicted(model, backend, documents.windows(tokenizer, bos), arguments.tokens, settings)
    asked = needles.windows(tokenizer, bos), needles.lookups(tokenizer, bos)
    full = ("full", None, arguments.budget)
    answers = recalled(model, *asked, arguments.tokens, [full, *settings])
    rows = []
    for setting in settings:
        whole = (setting[0], None, arguments.budget) if setting[1] and None in chunks else None
        measured = {"AOP": scores[setting][:, 0], "KL": scores[setting][:, 1], "recall": answers[setting]}
        compared = whole and {"AOP": scores[whole][:, 0], "KL": scores[whole][:, 1], "recall": answers[whole]}
        cells = {name: cell(values, compared and compared[name]) for name, values in measured.items()}
        rows.append({"method": setting[0], "chunk": setting[1] or "whole", **cells})
    print(f"{arguments.tokens} tokens, budget {arguments.budget}, {arguments.count} windows; ", end="")
    print(f"the full cache answers {answers[full].mean():.2f}")
    print(tabulate(rows, "keys", disable_numparse=True))


if __name__ == "__main__":
    main()
