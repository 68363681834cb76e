import hashlib
import sys

import numpy as np
import pytest
import torch

from pipeline.calibrate import calibrate, main
from pipeline.settings.compose import composed
from pipeline.settings.folders import PACKAGE
from pipeline.stages.gguf import CONVERTER
from spectral_kv.calibration import QueryStatistics, observe


@pytest.fixture
def command(monkeypatch):
    """`python -m pipeline.calibrate` with these arguments; the exit status."""

    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def authors_file(tmp_path):
    """Statistics of 2 layers, 3 query heads and 4 bands in the authors' format: mu = layer + i head, m = 9."""
    ones = torch.ones(4)
    heads = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": layer * ones,
            "q_mean_imag": head * ones,
            "q_abs_mean": 9 * ones,
        }
        for layer in range(2)
        for head in range(3)
    }
    torch.save({"metadata": {"rope_style": "half", "head_dim": 8}, "stats": heads}, tmp_path / "s.pt")
    return tmp_path / "s.pt"


@pytest.mark.parametrize("chunk", [None, 32])
def test_statistics_are_of_every_query_of_every_window_before_rotation(backend, rng, chunk):
    """Seen by a hook in front of the rotation; windows of different lengths weigh by their tokens."""
    seen = [[], []]
    hooks = [
        block.self_attn.q_proj.register_forward_hook(
            lambda module, inputs, output, layer=layer: seen[layer].append(output[0].reshape(-1, 4, 16).numpy())
        )
        for layer, block in enumerate(backend.model.model.layers)
    ]
    windows = [rng.integers(2, 8000, size=size) for size in (70, 30, 1)]
    try:
        statistics = observe(backend, windows, chunk).statistics()
    finally:
        for hook in hooks:
            hook.remove()
    assert statistics.metadata["tokens"] == "101"
    for layer in range(2):
        queries = np.concatenate(seen[layer])
        z = queries[..., :8] + 1j * queries[..., 8:]
        assert np.abs(z.mean(axis=0)).max() > 0.5
        np.testing.assert_allclose(statistics.mu[layer], z.mean(axis=0), atol=1e-3)
        np.testing.assert_allclose(statistics.modulus[layer], np.abs(z).mean(axis=0), atol=1e-3)


def test_a_calibrated_model_can_load_its_statistics(statistics, backend):
    """What the command wrote for the small model: text of 3 documents of 200 tokens, and which model it was."""
    shape = backend.shape
    loaded = QueryStatistics.load(statistics, (shape.layers, shape.query_heads, shape.dim // 2))
    assert loaded.metadata["tokens"] == "600"
    assert {"model", "text", "document"} <= set(loaded.metadata)
    assert (np.abs(loaded.mu) < loaded.modulus).all()


def test_converts_a_file_of_the_authors(command, authors_file, capsys):
    out = authors_file.parent / "new" / "s.safetensors"
    assert command("--from-pt", authors_file, "--out", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    loaded = QueryStatistics.load(out, (2, 3, 4))
    expected = np.arange(2)[:, None, None] + 1j * np.arange(3)[:, None] * np.ones(4)
    np.testing.assert_array_equal(loaded.mu, expected)
    assert (loaded.modulus == 9).all()
    assert loaded.metadata == {"rope_style": "half", "head_dim": "8"}


@pytest.mark.parametrize("found", ["other", "nothing"])
def test_says_in_a_sentence_what_it_cannot_convert(found, command, tmp_path, capsys):
    if found == "other":
        (tmp_path / "s.pt").write_text("not tensors")
    assert command("--from-pt", tmp_path / "s.pt", "--out", tmp_path / "s.safetensors") == 2
    said = capsys.readouterr().err
    assert said.startswith("pipeline: --from-pt: ") and str(tmp_path / "s.pt") in said
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize("more", [[], ["--out", "s.safetensors", "model=qwen2_5_0_5b"]], ids=["no out", "settings"])
def test_refuses_to_convert_without_a_place_or_with_settings(more, command, authors_file, capsys):
    assert command("--from-pt", authors_file, *more) == 2
    assert "give --out and no overrides" in capsys.readouterr().err


@pytest.mark.slow
def test_a_log_shows_progress_and_how_much_text_was_used(small, tmp_path, capsys):
    """Two windows of 200 tokens are asked for, and two are read."""
    calibrate([*small, "document=docstrings", "document.count=2"], tmp_path / "s.safetensors")
    said = capsys.readouterr().err
    assert ": 1 of 2, " in said and ": 2 of 2, " in said
    assert "400 tokens in 2 windows of the standard library's docstrings" in said


def test_the_statistics_of_smollm2_ship_and_are_of_text_that_is_not_evaluated():
    shipped = QueryStatistics.load(PACKAGE / "query_statistics" / "smollm2.safetensors", (30, 9, 32))
    assert shipped.metadata["tokens"] == str(16 * 4096) and shipped.metadata["text"] == "the calibration text"
    sha256 = composed(["model=smollm2"]).model.sha256
    assert shipped.metadata["model"] == hashlib.sha256(f"{sha256} {CONVERTER}".encode()).hexdigest()[:16]
