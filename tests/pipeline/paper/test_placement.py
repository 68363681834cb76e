import pytest

from pipeline.paper.placement import Placements
from pipeline.settings.config import BackendConfig

AUTO = BackendConfig("torch", "spectral_kv.backends.torch.TorchBackend", "auto", "auto", "bfloat16")


@pytest.fixture
def asked(monkeypatch) -> list:
    import pipeline.run

    calls = []
    monkeypatch.setattr(pipeline.run, "placed", lambda config: calls.append(config) or ("cpu", "float32"))
    return calls


def test_a_place_is_asked_for_once_a_machine(asked, tmp_path, monkeypatch):
    memory = tmp_path / "placements.json"
    assert Placements(memory).of(AUTO) == Placements(memory).of(AUTO) == ("cpu", "float32")
    assert len(asked) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # other accelerators
    assert Placements(memory).of(AUTO) == ("cpu", "float32")
    assert len(asked) == 2


def test_what_was_forgotten_or_damaged_is_asked_for_again(asked, tmp_path):
    memory = tmp_path / "placements.json"
    places = Placements(memory)
    places.of(AUTO)
    places.forget()
    places.of(AUTO)
    memory.write_text("{")
    Placements(memory).of(AUTO)
    assert len(asked) == 3
