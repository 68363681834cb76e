import pytest

from pipeline.documents.book import EVALUATION, book_text
from pipeline.documents.mixed import FILE_LIMIT, LIMIT, Mixed, _limited, shared_with_evaluation
from pipeline.documents.overlap import shingles
from pipeline.documents.pydoc import topics_text


@pytest.mark.slow
def test_kinds_of_text_that_share_nothing_with_the_evaluation_documents():
    texts = Mixed().texts()
    assert len(texts) == 5 and all(100_000 < len(text) <= LIMIT for text in texts)
    for evaluation in (topics_text(), *map(book_text, EVALUATION)):
        found = shingles(evaluation)
        assert all(len(found & shingles(text)) <= 1 for text in texts)  # a run may cross from paragraph to paragraph


def test_a_paragraph_of_an_evaluation_document_is_dropped():
    stolen = next(p for p in topics_text().split("\n\n") if len(p.split()) > 30)
    assert _limited(["Before.\n\n" + stolen + "\n\nAfter."]) == "Before.\n\nAfter."
    assert len(_limited(["x" * 2 * FILE_LIMIT])) == FILE_LIMIT


def test_runs_that_are_shared_with_evaluation_documents_are_found():
    words = book_text("persuasion").split()
    assert len(shared_with_evaluation(["a b c", "Before " + " ".join(words[5000:5012]) + " after"])) >= 2
    assert not shared_with_evaluation([" ".join(words[5000:5008])])
