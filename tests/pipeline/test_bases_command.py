import sys

import pytest

from pipeline.bases import bases, main
from spectral_kv.codec.bases import Bases


@pytest.mark.slow
def test_the_command_writes_bases_that_the_model_can_load(small, backend, tmp_path):
    """Two windows of 200 tokens, of which the four sinks are left out."""
    path = bases([*small, "document=docstrings", "document.count=2"], tmp_path / "new" / "b.safetensors", 2, 0.5)
    shape = backend.shape
    loaded = Bases.load(path, (shape.layers, shape.kv_heads, shape.dim))
    assert loaded.metadata["tokens"] == "392"
    assert {"model", "text", "document"} <= set(loaded.metadata) and loaded.metadata["overlap"] == "0"
    assert loaded.blocks[0].basis.shape == (128, 64)
    with pytest.raises(ValueError, match="another model"):
        Bases.load(path, (shape.layers, shape.kv_heads, shape.dim), "0" * 16)


@pytest.mark.parametrize("wrong", [["--layers", "0"], ["--share", "1.5"]])
def test_refuses_impossible_sizes(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bases", *wrong])
    with pytest.raises(SystemExit):
        main()
    assert "at least 1" in capsys.readouterr().err
