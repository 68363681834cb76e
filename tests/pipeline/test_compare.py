import numpy as np
import pandas as pd
import pytest

from pipeline.compare import assessed, compare, documents, explained, main
from pipeline.settings.errors import InputError
from pipeline.statistics import difference, differences, gap_closed, p_value
from pipeline.store.search import chosen


def test_the_paired_interval_is_that_of_the_differences(rng):
    """Documents differ much more than methods do: pairing finds a difference that single intervals hide."""
    easy = rng.normal(size=40)
    better, worse = easy + 0.1 + 0.01 * rng.normal(size=40), easy + 0.2
    value = difference(better, worse)
    assert value.mean == pytest.approx((better - worse).mean())
    assert -0.12 < value.low < value.mean < value.high < -0.08


def test_the_gap_is_zero_for_random_and_one_for_the_oracle(rng):
    chance, oracle = rng.normal(size=20) + 5, rng.normal(size=20) + 1
    assert gap_closed(chance, chance, oracle).mean == pytest.approx(0)
    assert gap_closed(oracle, chance, oracle).mean == pytest.approx(1)
    half = gap_closed((chance + oracle) / 2 + 0.1 * rng.normal(size=20), chance, oracle)
    assert 0.4 < half.low < half.mean < half.high < 0.6
    assert np.isnan(gap_closed(chance[:4], chance[:4], oracle[:4]).low)


def test_differences_are_printed_and_added_to_the_runs(small, run, capsys):
    settings = [*small, "document.count=5"]
    compare([*settings, "method=streaming,knorm"], ["method=random", "budget.tokens=60", "budget.recent=16"], gap=True)
    printed = capsys.readouterr().out
    assert "difference to random-60-dense" in printed and "oracle" in printed
    assert "after Holm over these 12 tests" in printed and "AOP 0.01, ND-PPL 0.01, KL 0.01" in printed
    knorm, chance = (run("document.count=5", f"method={m}") for m in ("knorm", "random"))
    assert knorm.reused and chance.reused  # what was there is not measured again
    ours, theirs = documents(knorm)["ppl/kl"], documents(chance)["ppl/kl"]
    assert len(ours) == 5
    assert knorm.metrics["ppl/kl_vs_random-60-dense"] == pytest.approx((ours - theirs).mean())
    low, high = (knorm.metrics[f"ppl/kl_vs_random-60-dense_{bound}"] for bound in ("low", "high"))
    assert low < (ours - theirs).mean() < high
    assert np.isfinite(knorm.metrics["aop/mean_gap"])


def test_a_difference_is_one_after_holm_and_equal_within_its_margin(rng):
    noise = rng.normal(size=(4, 12))
    reference = pd.DataFrame({"aop/mean": noise[0], "mass/mean": noise[0]})
    runs = [
        pd.DataFrame({"aop/mean": noise[0] + shift + 1e-3 * noise[1], "mass/mean": noise[0] + wide * noise[2]})
        for shift, wide in ((0.1, 1), (0.0, 1e-6), (0.0, 1))
    ]
    found = assessed(runs, reference)
    assert [own["aop/mean"].mark for own in found] == [" *", " =", " ="]
    assert all(own["mass/mean"].equivalence is None for own in found)  # no margin is known
    raw = p_value(differences(runs[0]["aop/mean"], reference["aop/mean"]))
    assert found[0]["aop/mean"].p == pytest.approx(6 * raw)
    assert "these 6 tests" in explained(found) and "(AOP 0.01)" in explained(found)


def test_refuses_other_documents(small):
    with pytest.raises(InputError, match="same documents"):
        compare([*small, "document.tokens=200,220"], ["method=random"], gap=False)


def test_the_reference_must_be_given(monkeypatch, capsys):
    for arguments in (["method=tri"], ["--runs", "--against", "method=tri"]):
        monkeypatch.setattr("sys.argv", ["pipeline.compare", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert "--against" in capsys.readouterr().err


def test_finished_runs_side_by_side_without_measuring(small, run, capsys, monkeypatch):
    outputs = next(o for o in small if o.startswith("outputs="))
    first, wide, other = run("method=random"), run("method=random", "budget=100"), run("method=streaming")
    again = run("method=random", "force=true")

    def ids(*overrides: str) -> list[str]:
        return [found.info.run_id for found in chosen([outputs, *overrides])]

    assert ids("method=random", "budget=60") == [again.run_id]  # the newest of a configuration
    assert ids("budget.tokens=60,100") == [wide.run_id, other.run_id, again.run_id]
    assert ids("method=random,streaming", "document.count=3", "phase.memory.generated=8.0") == ids()
    assert ids("method=tri") == []
    monkeypatch.setattr("sys.argv", ["pipeline.compare", "--runs", outputs, "budget=60", "--metrics", "memory/ratio"])
    main()
    printed = capsys.readouterr().out
    assert printed.count("3.33x") == 2 and "Random" in printed and other.run_id[:8] in printed
    assert first.run_id[:8] not in printed
    for arguments, words in (
        (["methd=random"], "no run has logged methd"),
        (["method=tri"], "no finished run fits"),
        (["method=random", "--metrics", "aop/men"], "no chosen run has the metric aop/men"),
        (["method"], "write setting=value"),
    ):
        monkeypatch.setattr("sys.argv", ["pipeline.compare", "--runs", outputs, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and words in capsys.readouterr().err
