import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.documents.base import content_hash
from pipeline.documents.book import EVALUATION, TITLES, Book, Calibration, book_text
from pipeline.documents.docstrings import Docstrings
from pipeline.documents.file import File
from pipeline.documents.hub import Hub
from pipeline.documents.lookups import chain, fact, needles
from pipeline.documents.overlap import shingles
from pipeline.documents.pydoc import Pydoc, topics_text
from pipeline.documents.repeated import Repeated
from pipeline.settings.errors import InputError
from tests.conftest import REFERENCE


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))


def test_windows_are_disjoint_consecutive_text_behind_bos(tokenizer):
    windows = Pydoc(tokens=500, continuation=100, count=5).windows(tokenizer, bos=0)
    assert [len(w) for w in windows] == [600] * 5
    text = topics_text()
    starts = []
    for window in windows:
        assert window[0] == 0
        starts.append(text.find(tokenizer.decode(window[5:595].tolist())))
    assert starts[0] >= 0 and all(b - a > 1000 for a, b in pairwise(starts))
    assert starts[-1] > len(text) / 2  # spread over the whole text


def test_without_bos_a_window_is_all_text(tokenizer):
    (window,) = Pydoc(tokens=50, continuation=10, count=1).windows(tokenizer, bos=None)
    assert len(window) == 60
    assert topics_text().startswith(tokenizer.decode(window.tolist()))


def test_files_are_not_joined(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 300)
    windows = File(tokens=80, continuation=20, count=4, path=str(tmp_path / "*.txt")).windows(tokenizer, bos=None)
    assert {tuple(set(tokenizer.decode(w.tolist()).split())) for w in windows} == {("a",), ("b",)}


def test_refuses_more_than_there_is(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(InputError, match=r"document.count=8 .* \(4 tokens, 0 windows\)"):
        File(path=str(tmp_path / "short.txt")).windows(tokenizer, bos=0)
    with pytest.raises(InputError, match=r"document.count=400"):
        Pydoc(count=400).windows(tokenizer, bos=0)


def test_refuses_bytes_that_are_no_text(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x80" * 1000)
    with pytest.raises(InputError, match="UTF-8"):
        File(path=str(tmp_path / "x.txt")).windows(tokenizer, bos=0)


def test_the_repeated_paragraph_repeats_and_fills_every_window(tokenizer):
    for paragraph in (None, "one two three"):
        (window,) = Repeated(tokens=3000, continuation=100, paragraph=paragraph).windows(tokenizer, bos=0)
        assert len(window) == 3100
        assert any((window[1:-period] == window[1 + period :]).all() for period in range(2, 200))


@pytest.mark.slow
def test_calibration_text_shares_nothing_with_the_evaluation_text():
    docstrings, novel = Calibration().texts()
    assert [docstrings] == Docstrings().texts()
    assert len(docstrings) > 500_000 and len(novel) > 400_000
    for text in (docstrings, novel):
        for evaluation in (topics_text(), *map(book_text, EVALUATION)):
            assert shingles(evaluation).isdisjoint(shingles(text))


def test_books_are_whole_and_of_their_own_kind(tokenizer):
    """First and last words, and as many chapters as each has; enough windows for a table, and none shared."""
    novel, bible, other = map(book_text, TITLES)
    assert len(re.findall(r"^Chapter \d+$", novel, re.MULTILINE)) == 24
    assert len(re.findall(r"^(?:Genesis|Exodus|Deuteronomy) \d+$", bible, re.MULTILINE)) == 50 + 40 + 34
    assert "Sir Walter Elliot, of Kellynch Hall" in novel[:200] and "national importance" in novel[-60:]
    assert (
        "In the beginning God created the heaven and the earth." in bible[:80] and "sight of all Israel" in bible[-60:]
    )
    assert "No one who had ever seen Catherine Morland" in other
    windows = [Book(title=title, count=20).windows(tokenizer, bos=0) for title in EVALUATION]
    assert len({w[:4096].tobytes() for both in windows for w in both}) == 40
    with pytest.raises(InputError, match=r"document\.title=emma is not known: choose one of persuasion, king_james"):
        Book(title="emma").check()


def test_shingles_see_through_case_and_punctuation():
    text = "One two, three: four five six seven eight nine ten"
    assert shingles(text) == {tuple(text.lower().replace(",", "").replace(":", "").split())}
    assert len(shingles(text + " eleven")) == 2
    assert not shingles("too short")


def test_the_hash_follows_the_tokens():
    a, b = np.arange(5), np.arange(5, 10)
    assert content_hash([a, b]) == content_hash([a.astype(np.int32), b])
    assert content_hash([a, b]) != content_hash([b, a])


def test_a_fact_names_its_value_and_is_reproducible():
    one, again = fact(np.random.default_rng(3)), fact(np.random.default_rng(3))
    assert one == again
    assert one.answer in one.statements[0] and len(one.answer) == 5
    assert one.answer not in one.question


def test_needles_share_an_attribute_and_nothing_else():
    found = needles(np.random.default_rng(0), 6)
    assert len({n.question for n in found}) == len({n.answer for n in found}) == 6
    assert len({n.question.split(" of the ")[0] for n in found}) == 1


def test_a_chain_hands_its_value_on():
    item = chain(np.random.default_rng(0), hops=3)
    names = item.answer.split(", VAR ")
    assert len(set(names)) == 4
    assert names[0] in item.statements[0]
    for statement, old, new in zip(item.statements[1:], names, names[1:], strict=False):
        assert statement.index(old) < statement.index(new)


def test_hub_rows_are_joined_and_failures_are_sentences(monkeypatch):
    class Rows(dict):
        column_names = ("text", "label")

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if arguments[0] == "owner/gone":
            raise ConnectionError("no such host\nsecond line")
        return Rows(text=["first row", "  ", "second row"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert Hub(id="owner/data", subset="a", revision="abc").texts() == ["first row\n\nsecond row"]
    assert calls == [(("owner/data", "a"), {"split": "test", "revision": "abc"})]
    with pytest.raises(InputError, match=r"document.column=words .* text, label"):
        Hub(column="words").texts()
    with pytest.raises(InputError, match=r"document.id=owner/gone can't be loaded \(no such host\)"):
        Hub(id="owner/gone").texts()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'spectral-kv\[hub\]'"):
        Hub().texts()
