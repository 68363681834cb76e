"""Values given to what Hydra composed before make what Hydra itself would compose."""

import pytest
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from pipeline.settings import compose as ours
from pipeline.settings.compose import composed, spelled_out

OVERRIDES = [
    ["method=wavelet", "budget=60", "document.tokens=200"],
    ["experiment=paper", "tracking.table=paper", "method=tri", "seed=3"],
    ["method=turboquant", "storage.value_bits=2", "storage=turboquant_3bit"],
    ["model.path='a b'", "phase=[memory,drift]", "phase.drift.tokens=8", "grid=x"],
    ["budget.tokens=null", "budget.bytes=1e6"],
]


def by_hydra(overrides: list[str]):
    with ours._configuration():
        return compose("config", overrides=spelled_out(overrides))


@pytest.mark.parametrize("overrides", OVERRIDES, ids=lambda o: o[0])
def test_values_are_given_as_hydra_gives_them(overrides):
    there = by_hydra(overrides)
    for _ in range(2):
        assert OmegaConf.to_yaml(composed(overrides)) == OmegaConf.to_yaml(there)
        assert composed(overrides) == there


def test_options_are_composed_once(monkeypatch):
    first = composed(["method=tova", "seed=1"])
    monkeypatch.setattr(ours, "compose", None)
    second = composed(["method=tova", "seed=2", "document.tokens=77"])
    assert (first.seed, second.seed, second.document.tokens) == (1, 2, 77)
    assert first.document.tokens == composed(["method=tova"]).document.tokens != 77


def test_a_configuration_stays_closed_to_settings_that_it_does_not_have():
    cfg = composed(["method=tova", "seed=1"])
    with pytest.raises(ConfigAttributeError):
        cfg.method.levels = 3


@pytest.mark.parametrize("override", ["method.levles=3", "seed=1,2", "metod=tri", "method=wavlet", "~seed=9"])
def test_what_can_not_be_given_is_refused_in_the_words_of_hydra(override):
    overrides = [override]
    with pytest.raises(HydraException) as there:
        by_hydra(overrides)
    with pytest.raises(HydraException) as here:
        composed(overrides)
    assert str(here.value) == str(there.value)


def test_settings_are_added_and_taken_away():
    assert composed(["+backend.more=1", "seed=2"]).backend.more == 1
    assert "figures" not in composed(["~tracking.figures", "seed=2"]).tracking
