"""lm-evaluation-harness reads compressed caches; on the small checkpoint, with the shipped tasks."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'spectral-kv[lm-eval]'")
TASKS = Path(__file__).parents[2] / "spectral_kv" / "lm_eval" / "tasks"
NAMES = ["spectral_kv_lookups", "spectral_kv_choices"]


@pytest.fixture(scope="module")
def evaluated(checkpoint):
    """Results of the shipped tasks, on three documents, by the name of a model and its further arguments."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    import spectral_kv.lm_eval.model  # noqa: F401

    manager, found = TaskManager(include_path=str(TASKS), include_defaults=False), {}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token  # its own is not one that the checkpoint has

    def evaluate(model: str, batch: int = 1, **more) -> dict:
        key = (model, batch, tuple(more.items()))
        if key not in found:
            found[key] = lm_eval.simple_evaluate(
                model=model, model_args=dict(pretrained=str(checkpoint), tokenizer=tokenizer, dtype="float32", **more),
                tasks=list(NAMES), limit=3, task_manager=manager, device="cpu", batch_size=batch, bootstrap_iters=0,
                log_samples=True,
            )  # fmt: skip
        return found[key]

    return evaluate


def scores(result: dict) -> dict:
    return {
        (task, name): value
        for task, metrics in result["results"].items()
        for name, value in metrics.items()
        if name.startswith(("exact_match,", "acc,"))
    }


def said(result: dict) -> list[str]:
    return [sample["resps"][0][0] for sample in result["samples"]["spectral_kv_lookups"]]


def likelihoods(result: dict) -> list[float]:
    return [resp[0][0] for sample in result["samples"]["spectral_kv_choices"] for resp in sample["resps"]]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_with_a_budget_of_all_tokens_scores_are_those_of_hf(evaluated, batch):
    plain, ours = evaluated("hf", batch), evaluated("spectral_kv", batch, method="keydiff", budget=4000)
    assert len(scores(plain)) == 2
    assert scores(ours) == scores(plain)
    assert said(ours) == said(plain)
    assert likelihoods(ours) == pytest.approx(likelihoods(plain), abs=1e-3)
    counts = ours["config"]["spectral_kv"]
    assert counts["loglikelihood"]["evicted_tokens"] == counts["generate_until"]["evicted_tokens"] == 0


def test_with_a_quarter_of_the_tokens_both_kinds_of_requests_read_something_else(evaluated):
    plain, ours = evaluated("hf"), evaluated("spectral_kv", method="keydiff", ratio=0.25)
    assert said(ours) != said(plain)
    apart = [abs(a - b) for a, b in zip(likelihoods(ours), likelihoods(plain), strict=True)]
    assert min(apart) > 1e-3  # each of the choices: also the first token of an answer is predicted by what was kept
    for kind in ("loglikelihood", "generate_until"):
        counts = ours["config"]["spectral_kv"][kind]
        assert counts["contexts"] == 3
        assert counts["held_tokens"] == pytest.approx(counts["context_tokens"] / 4, abs=2)
        assert counts["evicted_tokens"] == counts["context_tokens"] - counts["held_tokens"]


def test_scores_are_those_of_the_cache_that_the_library_makes(evaluated, checkpoint):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import spectral_kv

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ours = evaluated("spectral_kv", method="fourier", budget=100)
    sample = ours["samples"]["spectral_kv_choices"][0]
    arguments = [tuple(a.values())[:2] for a in sample["arguments"].values()] if isinstance(
        sample["arguments"], dict) else sample["arguments"]  # fmt: skip
    for (context, continuation), resp in zip(arguments, sample["resps"], strict=True):
        cache = spectral_kv.cache(model, "fourier", budget=100)
        head = tokenizer(context).input_ids
        tail = tokenizer(context + continuation).input_ids[len(head) :]
        with torch.no_grad():
            model(torch.tensor([head[:-1]]), past_key_values=cache)
            logits = model(torch.tensor([head[-1:] + tail[:-1]]), past_key_values=cache).logits[0]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()
        assert resp[0][0] == pytest.approx(float(wanted), abs=1e-3)


def test_what_was_evicted_is_logged(checkpoint, caplog):
    from lm_eval.api.instance import Instance

    from spectral_kv.lm_eval.model import SpectralKV

    lm = SpectralKV(str(checkpoint), method="streaming", budget=80, dtype="float32", device="cpu")
    requests = [
        Instance("loglikelihood", {}, ("one two three " * 60, f" {word}"), index)
        for index, word in enumerate(("four", "five six seven", "four"))
    ]
    with caplog.at_level(logging.INFO):
        first, second, third = lm.loglikelihood(requests, disable_tqdm=True)
    assert first == third != second
    seen, evicted = (int(re.search(rf"'{name}': (\d+)", caplog.text)[1]) for name in
                     ("context_tokens", "evicted_tokens"))  # fmt: skip
    assert seen == len(lm.tok_encode(("one two three " * 60).strip())) - 1
    assert evicted == seen - 80  # one context, whatever is asked of it


def test_beams_and_appending_are_those_of_the_library(checkpoint):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from spectral_kv.lm_eval.model import SpectralKV

    settings = dict(dtype="float32", device="cpu")
    asked = [
        Instance("generate_until", {}, ("one two three " * 40, {"until": ["\n"], "max_gen_toks": 6, "num_beams": 3}), 0)
    ]
    lm = SpectralKV(str(checkpoint), method="keydiff", budget=4000, decode="append", **settings)
    assert lm.generate_until(asked, disable_tqdm=True) == HFLM(str(checkpoint), **settings).generate_until(
        asked, disable_tqdm=True
    )
    assert (lm._cache(100).decode, lm._cache(100).every) == ("append", 1)
    assert lm.get_model_info()["spectral_kv"]["decode"] == "append"


@pytest.mark.parametrize("tasks", [["--tasks", "spectral_kv_choices"], ["--tasks=spectral_kv_choices"]])
def test_the_command_knows_the_shipped_tasks(monkeypatch, tasks):
    import lm_eval.__main__

    from spectral_kv.lm_eval.__main__ import main

    seen = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["spectral_kv.lm_eval", *tasks])
    main()
    assert seen[-2:] == ["--include_path", str(TASKS)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decode="no"), "decode=no is not known"),
        (dict(ratio=1.5), "ratio=1.5"),
        (dict(ratio=0.5, budget=10), "one of them"),
        (dict(budget=0.25), "budget=0.25 must be a number of tokens"),
        (dict(method="oracle_mass"), "is an oracle"),
        (dict(method="no"), "method=no is not known"),
    ],
)
def test_what_can_not_be_is_refused(checkpoint, settings, message):
    from spectral_kv.lm_eval.model import SpectralKV

    with pytest.raises(ValueError, match=message):
        SpectralKV(str(checkpoint), dtype="float32", device="cpu", **settings)


def test_a_text_without_a_context_is_refused(checkpoint):
    from spectral_kv.lm_eval.model import SpectralKV

    lm = SpectralKV(str(checkpoint), dtype="float32", device="cpu", method="keydiff")
    with pytest.raises(NotImplementedError, match="without a context"):
        lm.loglikelihood_rolling([])


def test_every_shipped_answer_is_one_of_the_numbers_in_its_text():
    documents = [json.loads(line) for line in (TASKS / "documents.jsonl").read_text().splitlines()]
    assert len(documents) == 24
    for document in documents:
        assert [document["text"].count(number) for number in document["choices"]] == [1, 1, 1, 1]
        assert document["answer"] in document["choices"]
        name = re.search(r"of the (.*)\?", document["question"])[1]
        (line,) = [line for line in document["text"].split("\n") if name in line]
        assert document["answer"] in line
