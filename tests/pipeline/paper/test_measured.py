import pytest

from pipeline.paper.measured import MeasuredSection


@pytest.mark.parametrize(("recall", "said"), [(0.59, "the full cache itself finds 0.59"), (0.6, None)])
def test_a_task_that_the_full_cache_fails_has_no_table(made, recall, said):
    runs = [made("full", {"retrieval/full_recall": [recall] * 8}), made("tri", {"retrieval/full_recall": [recall] * 8})]
    withheld = MeasuredSection("retrieval", "What is still found", 8, [], runs).withheld
    assert withheld is None if said is None else said in withheld
