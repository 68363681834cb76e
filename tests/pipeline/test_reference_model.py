"""The model that ships with the project is what its card says."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pipeline.documents.pydoc import Pydoc
from pipeline.settings.folders import PACKAGE
from spectral_kv.backends.torch import TorchBackend
from spectral_kv.metrics.prediction import log_softmax, negative_log_likelihood
from spectral_kv.storage.dense import Dense
from tests.conftest import REFERENCE


@pytest.fixture(scope="module")
def reference():
    return TorchBackend(str(REFERENCE), device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


def test_size_and_shape(reference):
    config = json.loads((REFERENCE / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["max_position_embeddings"] >= 8192
    assert (REFERENCE / "model.safetensors").stat().st_size <= 40e6
    shape = reference.shape
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.dim) == (8, 6, 2, 64)


def test_it_predicts_text_it_never_saw(reference, tokenizer):
    (window,) = Pydoc(tokens=900, continuation=100, count=1).windows(tokenizer, bos=0)
    extension = reference.extend(reference.compress(reference.prefill(window[:900], 1), None, Dense()), window[900:])
    nll = negative_log_likelihood(log_softmax(extension.logits[:-1]), torch.from_numpy(window[901:])).mean()
    assert nll < 3.5  # uniform over the vocabulary would be 9.0


def test_it_finds_a_planted_fact(reference, tokenizer):
    (window,) = Pydoc(tokens=900, continuation=2, count=1).windows(tokenizer, bos=0)
    fact = tokenizer.encode("\nThe access code of the violet heron is 70316.\n").ids
    question = tokenizer.encode(
        "\nWhat is the access code of the violet heron? The access code of the violet heron is"
    ).ids
    prompt = np.concatenate([window[:300], fact, window[300:900], question])
    cache = reference.compress(reference.prefill(prompt[:-1], 1), None, Dense())
    answer = tokenizer.decode(reference.generate(cache, int(prompt[-1]), 6))
    assert answer.strip() == "70316"


def test_every_training_package_is_named_with_a_permissive_licence():
    corpus = json.loads((PACKAGE / "reference_model" / "corpus.json").read_text())
    assert sum(p["tokens"] for p in corpus["packages"]) == corpus["tokens"]
    for package in corpus["packages"]:
        assert package["licence"] and "GPL" not in package["licence"]
    assert "cpython" not in {p["package"].lower() for p in corpus["packages"]}


def test_corpus_filter_drops_what_the_evaluation_text_says():
    from pipeline.reference_model.corpus import Filter

    shared = "The quick brown fox jumps over the lazy dog and then it rests under a tree for the whole afternoon."
    other = "Entirely different words fill this second paragraph, which has nothing to do with the first one at all."
    clean = Filter(f"before it. {shared} after it.")
    assert clean(f"{shared}\n\n{other}") == f"{other}\n"
    assert clean(other) == "\n"  # said before
    assert (clean.contaminated, clean.repeated) == (1, 1)


def test_its_tokenizer_pads_with_a_token_that_it_has():
    """Batches of another program would get a token behind the vocabulary otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    padded = tokenizer(["one", "one two three four"], padding=True)["input_ids"]
    assert len(padded[0]) == len(padded[1]) and max(map(max, padded)) < 8192
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
