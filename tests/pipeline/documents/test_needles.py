"""Documents with planted lookups: what stands where, and what is asked."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.documents.lookups import ATTRIBUTES, chains, distractors, facts, spliced
from pipeline.documents.needles import Needles, line_ends, stratified
from pipeline.documents.pydoc import Pydoc, topics_text
from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.errors import InputError
from tests.conftest import REFERENCE

SIZES = {"tokens": 1000, "continuation": 60, "count": 3}
PLANTED = {
    "single": rf"\n([^\n]*(?:{'|'.join(ATTRIBUTES)}) of the [^\n]*\.)\n",
    "multikey": rf"\n([^\n]*(?:{'|'.join(ATTRIBUTES)}) of the [^\n]*\.)\n",
    "chain": r"\n((?:The value \d{5} is stored in|VAR [A-Z]{3} is copied to) VAR [A-Z]{3}\.)\n",
}
VARIANTS = [(task, visible) for task in PLANTED for visible in (False, True)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    """A part of the language reference, which is quicker to cut into tokens."""
    part = topics_text()[:80_000]
    for module in ("needles", "pydoc"):
        monkeypatch.setattr(f"pipeline.documents.{module}.topics_text", lambda: part)


def made(task: str, visible: bool = False, **more) -> Needles:
    return Needles(**SIZES | {"task": task, "visible": visible, "questions": 1 if visible else 4} | more)


def place(ids: np.ndarray, piece: list[int]) -> int:
    """Where a piece stands, which must be exactly once."""
    (found,) = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, len(piece)) == piece).all(axis=1))
    return int(found)


@pytest.mark.parametrize(("task", "visible"), VARIANTS)
def test_sentences_stand_at_their_recorded_depth_in_text_that_is_otherwise_untouched(tokenizer, task, visible):
    source = made(task, visible)
    plain = Pydoc(**SIZES).windows(tokenizer, 0)
    for window, asked, text in zip(source.windows(tokenizer, 0), source.lookups(tokenizer, 0), plain, strict=True):
        assert len(window) == 1060 and len(asked) == source.questions
        prompt, continuation = window[:1000], window[1000:]
        if visible:  # the question but for its last token
            end = tokenizer.encode("\nWhich" if task == "chain" else "\nWhat is the").ids
            prompt = prompt[: place(prompt, end)]
        sentences = re.findall(PLANTED[task], tokenizer.decode(prompt.tolist()))
        pieces = [tokenizer.encode(f"\n{s}\n").ids for s in sentences]
        assert len(pieces) == (12 if task == "chain" else 4)
        starts, rest = [], prompt
        for piece in pieces:
            starts.append(place(rest, piece))  # the pieces before it are gone
            rest = np.delete(rest, np.s_[starts[-1] : starts[-1] + len(piece)])
        np.testing.assert_array_equal(np.concatenate([rest, continuation]), text[: len(rest) + 60])
        for one in asked:
            question, answer = (tokenizer.decode(x.tolist()) for x in (one.question, one.answer))
            if visible:
                question = tokenizer.decode(np.concatenate([window[len(prompt) : 1000], one.question]).tolist())
            value = re.search(r"\d{5}", question if task == "chain" else answer).group()
            (first,) = (i for i, s in enumerate(sentences) if value in s)
            assert one.depth == (starts[first] - 1) / (len(rest) - 1)
            if task != "chain":
                assert answer == f" {value}." and question.split("The ")[1].removesuffix(" is") in sentences[first]


def test_a_chain_stands_in_order_and_its_answer_names_all_of_it(tokenizer):
    source = made("chain")
    for window, asked in zip(source.windows(tokenizer, 0), source.lookups(tokenizer, 0), strict=True):
        text = tokenizer.decode(window[:1000].tolist())
        for one in asked:
            value = re.search(r"\d{5}", tokenizer.decode(one.question.tolist())).group()
            a, b, c = re.findall("VAR ([A-Z]{3})", "VAR" + tokenizer.decode(one.answer.tolist()))
            said = (
                f"{value} is stored in VAR {a}.",
                f"VAR {a} is copied to VAR {b}.",
                f"VAR {b} is copied to VAR {c}.",
            )
            places = [text.index(s) for s in said]
            assert places == sorted(places)


@pytest.mark.parametrize("task", PLANTED)
def test_the_question_ends_the_visible_prompt_and_is_absent_from_the_hidden_one(tokenizer, task):
    hidden, visible = made(task, questions=1), made(task, visible=True)
    ours = zip(hidden.windows(tokenizer, 0), hidden.lookups(tokenizer, 0), strict=True)
    theirs = zip(visible.windows(tokenizer, 0), visible.lookups(tokenizer, 0), strict=True)
    for (secret, (asked,)), (shown, (again,)) in zip(ours, theirs, strict=True):
        question = tokenizer.decode(asked.question.tolist())
        assert question.startswith("\nWh") and question.split("?")[0] not in tokenizer.decode(secret[:1000].tolist())
        # the same question, its last token held back: the compressed cache predicts the whole answer
        assert len(again.question) == 1
        np.testing.assert_array_equal(
            np.concatenate([shown[:1000], again.question])[-len(asked.question) :], asked.question
        )
        np.testing.assert_array_equal(again.answer, asked.answer)


def test_depths_cover_the_prompt_evenly_in_every_document_and_over_all(tokenizer, rng):
    depths = stratified(rng, 5, 4)
    assert sorted(np.floor(depths * 20).ravel()) == list(range(20))
    assert (np.floor(depths * 4) == np.arange(4)).all()
    assert not (np.diff(depths, axis=0) > 0).all(axis=0).any()  # document and depth are not tied
    recorded = np.array([[one.depth for one in asked] for asked in made("single", count=5).lookups(tokenizer, 0)])
    strata = np.arange(20) / 20
    assert (np.abs(np.sort(recorded.ravel()) - strata - 0.025) < 0.08).all()  # they move to the end of a line


def test_the_seed_decides(tokenizer):
    for task in PLANTED:
        one, again, other = (made(task, seed=seed) for seed in (3, 3, 4))
        one.lookups(tokenizer, 0)  # what was asked before changes nothing
        windows = [np.stack(source.windows(tokenizer, 0)) for source in (one, again, other)]
        answers = [
            [x.answer.tolist() for a in source.lookups(tokenizer, 0) for x in a] for source in (one, again, other)
        ]
        assert (windows[0] == windows[1]).all() and (windows[0] != windows[2]).any(axis=1).all()
        assert answers[0] == answers[1] != answers[2]


def test_without_bos_the_window_is_as_long(tokenizer):
    source = made("multikey")
    (window, *_), ((asked, *_), *_) = source.windows(tokenizer, None), source.lookups(tokenizer, None)
    assert len(window) == 1060 and window[0] != 0
    assert tokenizer.decode(asked.answer.tolist()).strip() in " ".join(tokenizer.decode(window.tolist()).split())


def test_other_sources_carry_no_lookups(tokenizer):
    assert Pydoc(**SIZES).lookups(tokenizer, 0) == [[], [], []]


def test_lone_facts_differ_in_attribute_and_chains_in_everything():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert len({f.question.split(" of the ")[0] for f in facts(rng, 6)}) == 6
        found = chains(rng, 30, hops=2)
        assert len({name for item in found for name in item.answer.split(", VAR ")}) == 90
        assert len({item.question for item in found}) == 30


def test_pieces_are_spliced_in_before_their_places():
    text = np.arange(5)
    pieces = [np.array(p) for p in ([10, 11], [12], [13])]
    assert spliced(text, pieces, [0, 3, 3]).tolist() == [10, 11, 0, 1, 2, 12, 13, 3, 4]
    assert spliced(text, pieces[:1], [5]).tolist() == [0, 1, 2, 3, 4, 10, 11]
    assert spliced(text, [], []).dtype == text.dtype


def test_lines_end_where_a_token_begins_or_ends_with_a_newline():
    words = {0: "a", 1: "\n  ", 2: ".\n", 3: "b"}

    class Stub:
        def decode(self, ids: list[int]) -> str:
            return "".join(words[i] for i in ids)

    assert line_ends(Stub(), np.array([0, 1, 3, 2, 3, 0])).tolist() == [0, 1, 4]


SETTINGS = [
    "budget.tokens=100",
    "document=needles",
    "document.tokens=400",
    "document.continuation=60",
    "document.count=2",
    "phase=retrieval",
]


def test_the_identity_follows_what_is_planted_and_what_is_asked(monkeypatch, tmp_path):
    def job(*overrides: str):
        return prepare(composed([*SETTINGS, f"outputs={tmp_path}", *overrides]))

    variants = [
        job(*o)
        for o in (
            ["document.task=single"],
            ["document.task=multikey"],
            ["document.planted=2", "document.questions=2"],
            ["document.planted=4", "document.questions=1"],
            ["document.visible=true", "document.questions=1"],
            ["document.seed=1"],
        )
    ]
    assert len({v.digest for v in variants}) == len({v.document_hash for v in variants}) == len(variants)
    first = job()
    assert (first.digest, first.document_hash) == (variants[0].digest, variants[0].document_hash)
    assert len(first.lookups) == 2 and len(first.lookups[0]) == 4
    # the same windows, fewer questions
    lookups = Needles.lookups
    monkeypatch.setattr(Needles, "lookups", lambda *arguments: [asked[:3] for asked in lookups(*arguments)])
    fewer = job()
    assert all((a == b).all() for a, b in zip(first.windows, fewer.windows, strict=True))
    assert first.digest != fewer.digest and first.document_hash != fewer.document_hash


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["document.task=needle"], ["document.task=needle", "multikey"]),
        (["document.visible=true"], ["document.visible=true", "document.questions=1"]),
        (["document.questions=5"], ["document.questions=5", "document.planted=4"]),
        (["document.questions=0"], ["document.questions=0", "1"]),
        (["document.planted=7"], ["document.planted=7", "document.task=multikey"]),
        (["document.tokens=100"], ["document.tokens=100", "document.planted=4"]),
        (["document.continuation=12"], ["document.continuation=12", "question and answer"]),
        (["document=pydoc", "phase=retrieval"], ["phase.retrieval", "document=pydoc", "choose document=needles"]),
        (
            ["document=pydoc", "phase=[perturbation,retrieval]", "phase.perturbation.positions=8"],
            ["phase.retrieval", "document=needles"],
        ),
    ],
)
def test_refusals_name_the_key_and_the_remedy(overrides, words, tmp_path):
    # a group can be chosen only once
    settings = [o for o in SETTINGS if o.partition("=")[0] not in {x.partition("=")[0] for x in overrides}]
    with pytest.raises(InputError) as refusal:
        prepare(composed([*settings, f"outputs={tmp_path}", "method=full", *overrides]))
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_distractors_differ_from_a_fact_in_one_word_of_its_name(rng):
    items = distractors(rng, 4)
    assert len(items) == 16 and len({item.question for item in items}) == 16
    words = [re.fullmatch(r"The ([a-z ]+) of the (\w+) (\w+) is", item.lead).groups() for item in items]
    assert len({attribute for attribute, _, _ in words}) == 1
    for index, (_, adjective, noun) in enumerate(words[4:]):
        _, own_adjective, own_noun = words[index // 3]
        assert (adjective == own_adjective) != (noun == own_noun)


def test_several_values_are_asked_for_in_the_order_of_the_text(tokenizer):
    window, asked = (x[0] for x in (made("multivalue").windows(tokenizer, 0), made("multivalue").lookups(tokenizer, 0)))
    text = tokenizer.decode(window.tolist())
    for one in asked:
        values = re.fullmatch(r" (\d{5}) and (\d{5})\.", tokenizer.decode(one.answer.tolist())).groups()
        name = re.search(r"s of the (\w+ \w+)\? The", tokenizer.decode(one.question.tolist()))[1]
        assert [text.count(f"of the {name} is {value}.") for value in values] == [1, 1]
        assert text.index(values[0]) < text.index(values[1])


def test_several_questions_are_answered_in_their_order(tokenizer):
    window, asked = (
        x[0]
        for x in (
            made("multiquery", continuation=90).windows(tokenizer, 0),
            made("multiquery", continuation=90).lookups(tokenizer, 0),
        )
    )
    text = tokenizer.decode(window.tolist())
    for one in asked:
        question, answer = (tokenizer.decode(x.tolist()) for x in (one.question, one.answer))
        names = re.findall(r"What is the [a-z ]+ of the (\w+ \w+)\?", question)
        values = re.findall(r"\d{5}", answer)
        assert len(names) == len(values) == 2 and question.endswith(f"of the {names[0]} is")
        assert f"of the {names[1]} is {values[1]}." in answer
        for name, value in zip(names, values, strict=True):
            assert len(re.findall(rf"{value}[^\n]*{name}|{name}[^\n]*{value}", text)) == 1
