import numpy as np
import pytest
from safetensors.numpy import save_file

from spectral_kv.calibration import Accumulator, QueryStatistics


def test_statistics_over_chunks_are_those_of_the_whole(rng):
    queries = rng.normal(size=(2, 4, 100, 16)) + 1.0  # layers, heads, tokens, dim
    sums = Accumulator(2, 4, 8)
    for layer in range(2):
        for part in np.split(queries[layer], [7, 40], axis=1):
            sums.add(layer, part)
    statistics = sums.statistics(text="noise")
    z = queries[..., :8] + 1j * queries[..., 8:]
    np.testing.assert_allclose(statistics.mu, z.mean(axis=2))
    np.testing.assert_allclose(statistics.modulus, np.abs(z).mean(axis=2))
    assert (statistics.modulus >= np.abs(statistics.mu)).all()
    assert statistics.metadata == {"text": "noise", "tokens": "100"}


def test_a_file_comes_back_as_it_was(tmp_path, rng):
    statistics = QueryStatistics(
        rng.normal(size=(2, 4, 8)) + 1j * rng.normal(size=(2, 4, 8)), rng.random((2, 4, 8)), {"model": "x"}
    )
    statistics.save(tmp_path / "s.safetensors")
    loaded = QueryStatistics.load(tmp_path / "s.safetensors", (2, 4, 8))
    np.testing.assert_allclose(loaded.mu, statistics.mu, rtol=1e-6)
    np.testing.assert_allclose(loaded.modulus, statistics.modulus, rtol=1e-6)
    assert loaded.metadata == {"model": "x"}
    with pytest.raises(ValueError, match=r"\[2, 4, 8\], this model has \[3, 4, 8\]"):
        QueryStatistics.load(tmp_path / "s.safetensors", (3, 4, 8))


def test_refuses_other_files(tmp_path):
    (tmp_path / "text").write_text("not tensors")
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors"):
        with pytest.raises(ValueError, match="does not hold query statistics"):
            QueryStatistics.load(tmp_path / name, (1, 1, 1))
