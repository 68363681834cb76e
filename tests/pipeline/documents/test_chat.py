"""Questions in a model's own chat form, against what transformers makes of the same template."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.documents.chat import Chat
from pipeline.documents.needles import Needles
from pipeline.documents.pydoc import topics_text
from pipeline.settings.errors import InputError
from tests.conftest import REFERENCE

TEMPLATE = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ bos_token }}[system]
You answer.[end]
{% endif %}
[{{ message['role'] }}]
{{ message['content'] }}[end]
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}
"""
BOS = "<|begin|>"
SIZES = {"tokens": 600, "continuation": 80, "count": 2, "planted": 2, "questions": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


@pytest.fixture
def chat(tokenizer) -> Chat:
    return Chat(TEMPLATE, (("bos_token", tokenizer.id_to_token(0)),))


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    part = topics_text()[:30_000]
    for module in ("needles", "pydoc"):
        monkeypatch.setattr(f"pipeline.documents.{module}.topics_text", lambda: part)


def test_renders_what_transformers_renders(chat):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(REFERENCE / "tokenizer.json"),
        chat_template=TEMPLATE,
        bos_token=dict(chat.tokens)["bos_token"],
    )
    messages = [{"role": "user", "content": "A text.\n\nWhat is it?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = chat.around("What is it?")
    assert before + "A text." + after == expected
    assert after.startswith("\n\nWhat is it?[end]\n") and after.endswith("[assistant]\n")


def test_document_and_question_are_one_turn_of_a_user(tokenizer, chat):
    """Read together, opening, text, question and lead are the conversation that the template makes of them."""
    source = Needles(**SIZES)
    for window, asked in zip(source.windows(tokenizer, 0, chat), source.lookups(tokenizer, 0, chat), strict=True):
        assert len(window) == 680 and (window == 0).sum() == 1 and window[0] == 0  # one BOS, though both ask for it
        for one in asked:
            said = tokenizer.decode(np.concatenate([window[:600], one.question]).tolist(), skip_special_tokens=False)
            document = said.split("[user]\n")[1].split("\n\nWhat is the")[-2]
            question = said.split("[end]\n")[-2].split("\n\n")[-1]
            before, after = chat.around(question)
            assert said.startswith(before) and document and after in said
            lead = said.split(after)[1]
            assert lead == question.removeprefix("What is t").replace("he", "The", 1).removesuffix("?") + " is"
            assert tokenizer.decode(one.answer.tolist()).startswith(" ")


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize("task", ["single", "chain"])
def test_places_are_those_of_the_sentences_that_hold_the_answer(form, task, tokenizer, chat):
    source = Needles(**SIZES, form=form, task=task)
    for window, asked in zip(source.windows(tokenizer, 0, chat), source.lookups(tokenizer, 0, chat), strict=True):
        for one in asked:
            sentences = tokenizer.decode(window[one.places].tolist())
            wanted = tokenizer.decode(one.answer.tolist()).strip(" .").split(", VAR ")
            assert all(word in sentences for word in wanted)
            assert len(sentences.strip().splitlines()) == (5 if task == "chain" else 1)  # blank lines between three


def test_plain_where_there_is_no_template_or_it_is_not_wanted(tokenizer, chat):
    plain = [w.tolist() for w in Needles(**SIZES).windows(tokenizer, 0)]
    assert plain == [w.tolist() for w in Needles(**SIZES, form="plain").windows(tokenizer, 0, chat)]
    assert plain != [w.tolist() for w in Needles(**SIZES).windows(tokenizer, 0, chat)]
    with pytest.raises(InputError, match=r"document\.form=chat needs a chat template, .* set document\.form=plain"):
        Needles(**SIZES, form="chat").windows(tokenizer, 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no users here') }}", r"can't be rendered \(no users here\)"),
        ("{% for m in messages %}", "can't be rendered"),
        ("{{ messages[0]['nothing'].strip() }}", "can't be rendered"),
        ("Hello.", "drops what a user says"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_sentence(template, said):
    with pytest.raises(InputError, match=f"{said}.* set document\\.form=plain$"):
        Chat(template).around("What?")


def test_what_templates_mark_and_break_off_is_rendered_as_transformers_does(tokenizer):
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% endfor %}{% generation %}<assistant>{{ 'says: ' }}{% endgeneration %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(REFERENCE / "tokenizer.json"), chat_template=template)
    expected = theirs.apply_chat_template([{"role": "user", "content": "A text.\n\nWhat?"}], tokenize=False)
    before, after = Chat(template).around("What?")
    assert before + "A text." + after == expected == "<user>A text.\n\nWhat?<assistant>says: "


def test_needles_can_be_planted_in_a_book(tokenizer):
    for text, word in [("persuasion", "Anne"), ("king_james", "LORD")]:
        windows = Needles(**SIZES | {"count": 8}, text=text).windows(tokenizer, 0)
        assert word in " ".join(tokenizer.decode(w.tolist()) for w in windows)
    with pytest.raises(InputError, match=r"document\.text=news is not known: choose one of pydoc, persuasion"):
        Needles(text="news").check()
