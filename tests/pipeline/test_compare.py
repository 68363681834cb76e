import numpy as np
import pytest

from pipeline.aggregate import difference, gap_closed
from pipeline.compare import compare, documents, main
from pipeline.errors import InputError


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
    knorm, chance = (run("document.count=5", f"method={m}") for m in ("knorm", "random"))
    assert knorm.reused and chance.reused  # what was there is not measured again
    ours, theirs = documents(knorm)["ppl/kl"], documents(chance)["ppl/kl"]
    assert len(ours) == 5
    assert knorm.metrics["ppl/kl_vs_random-60-dense"] == pytest.approx((ours - theirs).mean())
    low, high = (knorm.metrics[f"ppl/kl_vs_random-60-dense_{bound}"] for bound in ("low", "high"))
    assert low < (ours - theirs).mean() < high
    assert np.isfinite(knorm.metrics["aop/mean_gap"])


def test_refuses_other_documents(small):
    with pytest.raises(InputError, match="same documents"):
        compare([*small, "document.tokens=200,220"], ["method=random"], gap=False)


def test_the_reference_must_be_given(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pipeline.compare", "method=tri"])
    with pytest.raises(SystemExit):
        main()
    assert "--against" in capsys.readouterr().err
