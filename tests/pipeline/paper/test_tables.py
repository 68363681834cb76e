"""Tables of sections, from runs whose numbers are known."""

from pipeline.paper.measured import MeasuredSection
from pipeline.paper.sections import titles
from pipeline.paper.tables import TABLES


def test_every_section_has_its_tables():
    assert set(TABLES) == set(titles())


def test_methods_that_resemble_recency_come_first_and_the_full_cache_has_no_line(made):
    def like(recency: float, knorm: float) -> dict:
        return {f"correlation/{name}": [value] * 4 for name, value in (("recency", recency), ("knorm", knorm))}

    runs = [made("tri", like(0.1, -0.5)), made("full", {"aop/mean": [0.0] * 4}), made("wavelet", like(0.6, 0.2))]
    (found,) = TABLES["correlation"](MeasuredSection("correlation", "title", 4, [], runs))
    assert list(found.cells["method"]) == ["WaveletKV", "TriAttentionKV"]
    assert [cell[:5] for cell in found.cells["with recency"]] == ["+0.60", "+0.10"]
    assert [cell[:5] for cell in found.cells["with Knorm"]] == ["+0.20", "-0.50"]


def test_rivals_have_a_table_for_each_task_that_the_full_cache_can_do(made):
    def run(method: str, allocation: str, task: str, full: float, found: list[float]):
        choice = {"method": method, "budget.allocation": allocation, "document.task": task}
        return made(method, {"retrieval/recall": found, "retrieval/full_recall": [full] * 8}, choice)

    few, many = [0.0, 0.25, 0.0, 0.25] * 2, [0.75, 1.0, 1.0, 0.75] * 2
    runs = [
        run(*about, task, full, found)
        for task, full in (("single", 0.9), ("chain", 0.5), ("distractor", 0.6))
        for *about, found in (("streaming", "uniform", few), ("kvzip", "uniform", few), ("kvzip", "global", many))
    ]
    single, distractor = TABLES["rivals_retrieval"](MeasuredSection("rivals_retrieval", "title", 8, [], runs))
    assert (single.name, distractor.name) == ("rivals_single", "rivals_distractor")
    assert single.cells["allocation"].iloc[0] == "global"
    best, recent, own = single.cells["recall - StreamingLLM's"]
    assert best.startswith("+0.75") and best.endswith("*") and recent == "-" and own.startswith("+0.00")
    assert "0.90" in single.note and "chain (0.50)" in distractor.note and "chain" not in single.note
