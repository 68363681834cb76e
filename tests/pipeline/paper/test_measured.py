from types import SimpleNamespace

import pytest

from pipeline.paper.__main__ import regenerate
from pipeline.paper.measured import MeasuredSection, _next, _parts, served


@pytest.mark.parametrize(("recall", "said"), [(0.59, "the full cache itself finds 0.59"), (0.6, None)])
def test_a_task_that_the_full_cache_fails_has_no_table(made, recall, said):
    runs = [made("full", {"retrieval/full_recall": [recall] * 8}), made("tri", {"retrieval/full_recall": [recall] * 8})]
    withheld = MeasuredSection("retrieval", "What is still found", 8, [], runs).withheld
    assert withheld is None if said is None else said in withheld


def test_one_task_that_the_full_cache_can_do_is_enough(made):
    runs = [made("tri", {"retrieval/full_recall": [recall] * 8}) for recall in (0.1, 0.9)]
    assert MeasuredSection("rivals_retrieval", "What rivals still find", 8, [], runs).withheld is None


@pytest.fixture
def job():
    """Makes what planning asks of a job."""

    def make(document: str, method: str = "tri", phases: dict | None = None) -> SimpleNamespace:
        phases = {"memory": {"tokens": 1}} if phases is None else phases
        resolved = {"method": method, "phase": phases, "tracking": {"table": document}}
        return SimpleNamespace(
            resolved=resolved, document_hash=document, checkpoint=SimpleNamespace(hash="model"),
            settings=SimpleNamespace(phases=phases),
        )  # fmt: skip

    return make


def test_a_job_is_served_by_one_that_measures_all_its_phases_and_more(job):
    memory, drift = {"memory": {"tokens": 1}}, {"drift": {"turns": 5}}
    jobs = {
        "whole": job("d", phases=memory | drift), "part": job("d", phases=memory),
        "other settings": job("d", phases={"memory": {"tokens": 2}}), "other phase": job("d", phases={"kept": {}}),
        "other documents": job("e", phases=memory), "other method": job("d", "wavelet", memory),
    }  # fmt: skip
    assert served(jobs) == {"part": "whole"}


A, B, C = (("model", name) for name in "abc")
NOWHERE = (None, False)


def test_processes_stay_with_their_documents(job):
    left = [job("a"), job("a"), job("b"), job("c"), job("c"), job("c")]
    assert _next(left, NOWHERE, set(), set()) == (left[0], (A, False))
    assert _next(left, (C, False), {(A, False)}, set()) == (left[3], (C, False))  # its own
    assert _next(left, (None, True), {(A, False)}, set()) == (left[2], (B, False))  # nobody's
    others = {(A, False), (C, False)}
    assert _next(left[:2] + left[3:], (B, False), others, set()) == (left[3], (C, True))  # where most is left


def test_the_first_who_joins_begins_with_what_needs_least_of_the_full_cache(job):
    """Of its documents every process measures what it needs of the full cache itself."""
    memory, more = {"memory": {}}, {"memory": {}, "match": {}}
    left = [job("a", "tri", memory), job("a", "tri", more), job("a", "wavelet", memory), job("a", "wavelet", more)]
    parts = _parts([*left, job("b", "tri", memory)])
    assert parts == {id(left[0]), id(left[2])}
    first, joined = (A, False), (A, True)
    assert _next(left, NOWHERE, set(), parts) == (left[1], first)
    assert _next(left, first, {joined}, parts) == (left[1], first)
    assert _next(left, NOWHERE, {first}, parts) == (left[0], joined)
    assert _next(left[1:], joined, {first}, parts) == (left[2], joined)
    assert _next(left, NOWHERE, {first, joined}, parts) == (left[1], first)  # a third
    assert _next(left[1::2], joined, {first}, parts) == (left[1], joined)  # what there is
    assert _next(left[::2], first, {joined}, parts) == (left[0], first)


@pytest.mark.slow
def test_baselines_read_the_runs_of_the_published_comparison(small, capsys):
    own = [o for o in small if not o.startswith(("document.count", "budget.tokens"))]
    own = [*own, "budget.tokens=60", "phase.drift.tokens=8", "phase.drift.positions=4", "phase.match.tokens=4"]
    regenerate(["paper", "baselines"], [*own, "method=streaming,wavelet"])
    assert "2 configurations measured, 0 were there already" in capsys.readouterr().out
