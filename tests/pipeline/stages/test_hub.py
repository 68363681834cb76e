"""Checkpoints of the hub, without one: what it would give is made up."""

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest

from pipeline.settings.compose import composed
from pipeline.settings.config import model_settings
from pipeline.settings.errors import InputError
from pipeline.stages import checkpoint

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Hub:
    """A repository of two shards; `local` has what a cache holds, `calls` how often it was asked for the rest."""

    def __init__(self, local: Path):
        self.local, self.calls, self.breaks = local, 0, None

    def __call__(self, name: str, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            self.calls += 1
            if self.breaks:
                raise self.breaks
            self.put("config.json", "tokenizer.json", *SHARDS, "model.safetensors.index.json")
        return str(self.local)

    def put(self, *names: str) -> None:
        index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
        for name in names:
            (self.local / name).write_text(index if name.endswith("index.json") else "{}")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.setattr(checkpoint, "reachable", lambda endpoint: True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return hub


@pytest.fixture
def model():
    return model_settings(composed(["model=qwen3_0_6b"]))


@pytest.mark.parametrize(
    "there",
    [
        ["config.json", "tokenizer.json"],
        ["config.json", "tokenizer.json", SHARDS[0]],
        ["config.json", "tokenizer.json", SHARDS[0], "model.safetensors.index.json"],
        [*SHARDS, "model.safetensors.index.json", "config.json"],
    ],
)
def test_what_an_interrupted_download_left_is_completed(there, hub, model):
    hub.put(*there)
    assert checkpoint.hub_snapshot(model) == hub.local and hub.calls == 1
    assert checkpoint.hub_snapshot(model) == hub.local and hub.calls == 1  # whole, nobody is asked


def test_a_single_file_of_weights_needs_no_index(hub, model):
    hub.put("config.json", "tokenizer.json", "model.safetensors")
    assert checkpoint.hub_snapshot(model) == hub.local and hub.calls == 0


def test_a_part_that_can_not_be_completed_is_not_loaded(hub, model, monkeypatch):
    hub.put("config.json", "tokenizer.json", SHARDS[0])
    monkeypatch.setattr(checkpoint, "reachable", lambda endpoint: False)
    with pytest.raises(InputError, match=r"model\.id=Qwen/Qwen3-0\.6B is only in part in the local .* connect"):
        checkpoint.hub_snapshot(model)


def test_a_transport_that_breaks_is_said_in_a_sentence(hub, model):
    class Broken(Exception):  # not an OSError, as those of HTTP clients are not
        pass

    hub.breaks = Broken("peer closed connection\nand more")
    with pytest.raises(InputError, match=r"can't be downloaded \(peer closed connection\): check the name, or set"):
        checkpoint.hub_snapshot(model)


def test_what_stands_behind_a_proxy_is_asked_through_it(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        assert not checkpoint.reachable(f"https://{address}")
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
        assert checkpoint.reachable(f"https://{address}") and not checkpoint.reachable(f"http://{address}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert not checkpoint.reachable(f"https://{address}")
