"""The options of conf/model: each composes, and is checked before anything is downloaded."""

from pathlib import Path

import pytest

from pipeline.job import prepare
from pipeline.settings.compose import composed
from pipeline.settings.config import model_settings
from pipeline.settings.errors import InputError
from pipeline.settings.folders import conf_dir
from pipeline.stages.checkpoint import locate

OPTIONS = sorted(file.stem for file in (Path(conf_dir()) / "model").glob("*.yaml"))
ON_THE_HUB = [name for name in OPTIONS if name not in ("reference", "smollm2", "synthetic")]


def test_the_models_that_people_use_are_there():
    sizes = {
        "qwen2_5": ("0_5b", "1_5b", "3b", "7b"),
        "qwen3": ("0_6b", "1_7b", "4b", "8b"),
        "llama3": ("8b", "1_8b", "2_1b", "2_3b"),
        "smollm2": ("135m", "360m", "1_7b"),
    }
    assert {f"{family}_{size}" for family, of in sizes.items() for size in of} == set(ON_THE_HUB)


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_an_option_names_itself_its_repository_and_its_context(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = model_settings(composed([f"model={name}"]))
    assert model.name == name and "/" in model.id and model.path is None
    parts = set(name.replace("llama3_1", "llama-3.1").replace("llama3_2", "llama-3.2").split("_"))
    assert any(part in model.id.lower() for part in parts)
    assert model.bos == name.startswith("llama3")
    with pytest.raises(InputError, match=rf"exceed the {model.context} positions of model={name}"):
        locate(model, tmp_path, model.context, 1)
    with pytest.raises(InputError, match=rf"model\.id={model.id} is not in the local .* or set model\.path="):
        locate(model, tmp_path, model.context - 1, 1)


def test_a_context_that_is_exceeded_is_said_before_a_file_is_looked_for(tmp_path):
    settings = ["model=smollm2", f"checkpoints={tmp_path}", f"outputs={tmp_path}/outputs", "document.tokens=8000"]
    with pytest.raises(InputError, match="exceed the 8192 positions of model=smollm2: ask for shorter documents"):
        prepare(composed(settings))


def test_tables_say_what_the_weights_were_rounded_to():
    assert model_settings(composed(["model=smollm2"])).title == "smollm2 (Q4_1 weights)"
    assert model_settings(composed([])).title == "reference"
