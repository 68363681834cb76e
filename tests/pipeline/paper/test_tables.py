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
