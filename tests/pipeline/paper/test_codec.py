"""The section on the transform coder: what its grid is, and which rival a run is compared with."""

import json
from types import SimpleNamespace

from pipeline.paper.figures import rate_distortion
from pipeline.paper.finished import FinishedRun
from pipeline.paper.sections import _inside, titles, usual
from pipeline.paper.tables import codec, coded, rival, smaller


def run(method: str, storage: str, ratio: float, kl: float, **more) -> FinishedRun:
    metrics = {"memory/ratio": ratio, "ppl/kl": kl} | more
    return FinishedRun(
        f"{method}{storage}{ratio}", {"storage": storage}, 1, metrics, {"method": method, "title": method}, str
    )


def test_the_section_belongs_to_the_whole_document():
    assert "codec" in titles() and "codec" in usual(True) and "codec" not in usual(False)
    assert "paper" in usual(False)


def test_models_without_bases_do_without_it():
    assert "codec" in usual(True, ["model=reference", "document.count=2"])
    assert "codec" not in usual(True, ["model=smollm2"]) and "paper" in usual(True, ["model=smollm2"])
    assert "codec" in usual(True, ["model=smollm2", "+model.bases=/x"])
    assert "codec" not in usual(True, [], ["reference", "smollm2"])


def test_a_grid_is_taken_apart():
    job = ["experiment=codec", 'grid="method=full,random storage=dense budget.tokens=100,200"', "seed=3"]
    found = list(_inside(job))
    assert len(found) == 4 and all(keys == ["method", "storage", "budget.tokens"] for _, keys in found)
    assert {tuple(sorted(o for o in inner if "=" in o)) for inner, _ in found} == {
        tuple(sorted(["experiment=codec", "seed=3", "storage=dense", f"method={m}", f"budget.tokens={b}"]))
        for m in ("full", "random")
        for b in (100, 200)
    }
    assert list(_inside(["method=tri"])) == [(["method=tri"], [])]


def test_a_run_is_compared_with_the_best_of_its_bytes():
    live = run("full", "spectral", 8.0, 0.002)
    rest = run("full", "spectral_at_rest", 1.0, 0.003, **{"memory/at_rest_ratio": 16.0})
    others = [
        run("full", "turboquant_4bit", 3.6, 0.001),
        run("streaming", "turboquant_3bit", 8.1, 0.05),
        run("wavelet_tri", "turboquant_3bit", 7.9, 0.04),
        run("streaming", "dense", 8.0, 0.3),
    ]
    runs = [live, rest, *others]
    assert rival(live, runs) is others[2]
    assert rival(rest, runs) is None and rival(others[1], runs) is None
    assert [smaller(r) for r in (live, rest)] == [8.0, 16.0]
    assert coded(rest) == "transform coder at rest"


def test_the_figure_is_drawn_only_where_there_is_a_section():
    assert rate_distortion({}) is None


def measured(method: str, storage: str, ratio: float, kl: list[float], **more) -> FinishedRun:
    """A run on a window a KL."""
    values = {"memory/ratio": [ratio] * len(kl), "ppl/kl": kl, "ppl/nd": kl, "aop/mean": kl}
    values |= {name: [value] * len(kl) for name, value in more.items()}
    names = ["document", "layer", "head", "turn", "depth", "position", "frequency", "metric", "value"]
    rows = [[d, *[None] * 6, m, v] for m, own in values.items() for d, v in enumerate(own)]
    metrics = {m: sum(own) / len(own) for m, own in values.items()}
    tags = {"method": method, "title": {"full": "Full cache"}.get(method, method)}
    text = json.dumps({"columns": names, "data": rows})
    return FinishedRun(f"{method} {storage} {ratio}", {"storage": storage}, len(kl), metrics, tags, lambda: text)


def test_the_table_and_the_figure_of_a_section():
    runs = [
        measured("full", "spectral", 8.0, [0.001, 0.002, 0.003], **{"memory/bases_mb": 3.6}),
        measured("full", "spectral", 14.0, [0.004, 0.005, 0.006], **{"memory/bases_mb": 3.6}),
        measured("full", "spectral_at_rest", 1.0, [0.003] * 3, **{"memory/at_rest_ratio": 16.0}),
        measured("streaming", "turboquant_3bit", 8.0, [0.04, 0.05, 0.06]),
    ]
    section = SimpleNamespace(runs=runs)
    (table,) = codec(section)
    assert list(table.cells["held in"]) == [
        "transform coder", "TurboQuant, 3 bit", "transform coder", "transform coder at rest",
    ]  # fmt: skip
    assert table.numbers["ppl/kl_difference"].round(4).tolist()[0] == -0.048
    assert table.numbers["ppl/kl_difference"].isna().tolist() == [False, True, True, True]
    figure = rate_distortion({"codec": section})
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == [
        "transform coder", "transform coder at rest", "streaming in TurboQuant, 3 bit",
    ]  # fmt: skip
    assert list(axes.lines[0].get_xdata()) == [8.0, 14.0]
