from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from pipeline.phases.kept import Kept
from pipeline.phases.spectra import band_edges, power


def rows(run_id: str) -> pd.DataFrame:
    import mlflow

    table = mlflow.load_table("rows.json", run_ids=[run_id])
    numbers = ("layer", "position", "frequency", "value")
    return table.assign(**{c: pd.to_numeric(table[c]) for c in numbers})


def test_streaming_keeps_both_ends_and_the_full_cache_everything(run):
    """60 of 200 tokens: 4 sinks and the last 56 are kept, so tokens 144 to 199."""
    table = rows(run("method=streaming", "+phase=kept", "phase.kept.width=10").run_id)
    share = table[table["metric"] == "kept/share"]
    assert set(share["document"]) == {0}
    for _, layer in share.groupby("layer"):
        found = layer.sort_values("position")["value"].tolist()
        assert found == pytest.approx([0.4] + [0.0] * 13 + [0.6] + [1.0] * 5)
    depth = table.loc[table["metric"] == "kept/depth", "value"]
    assert len(depth) == 3
    kept = [*range(4), *range(144, 200)]
    assert depth.tolist() == pytest.approx([np.mean(kept) / 199] * 3)
    odd = table.loc[table["metric"] == "kept/odd", "value"]
    assert odd.tolist() == pytest.approx([0.5] * 3)  # of tokens 144 to 183
    full = run("method=full", "+phase=kept")
    everything = rows(full.run_id)
    assert (everything.loc[everything["metric"] == "kept/share", "value"] == 1).all()
    assert full.metrics["kept/depth"] == 0.5


def test_the_full_cache_rebuilds_its_own_spectrum_and_eviction_loses_the_high_frequencies(run):
    def spectra(method: str) -> tuple[pd.Series, pd.Series]:
        table = rows(run(f"method={method}", "+phase=spectra", "phase.spectra.bands=6").run_id)
        by = ["document", "layer", "frequency"]
        return tuple(table[table["metric"] == f"spectrum/{m}"].set_index(by)["value"] for m in ("full", "rebuilt"))

    full, rebuilt = spectra("full")
    pd.testing.assert_series_equal(full, rebuilt, rtol=1e-4)
    assert 0 < full.index.get_level_values("frequency").max() <= 0.5
    before, after = (x.groupby("frequency").mean() for x in spectra("streaming"))
    assert after.iloc[-1] < 0.5 * before.iloc[-1]  # most tokens are interpolated, and a line has no high frequencies


def test_white_noise_has_power_one_and_a_tone_is_in_its_band(rng):
    edges = band_edges(1024, 8)
    assert power(rng.normal(size=(2, 1024, 64)), edges) == pytest.approx(1, rel=0.3)
    tone = np.cos(2 * np.pi * 100 * np.arange(1024) / 1024)[None, :, None]
    band = np.searchsorted(edges, 100, side="right") - 1
    found = power(tone + 5.0, edges)  # the constant is in no band
    assert found.argmax() == band
    assert found[band] * (edges[band + 1] - edges[band]) == pytest.approx(1024 / 4)
    assert np.delete(found, band) == pytest.approx(0, abs=1e-9)
    assert edges[0] == 1 and edges[-1] == 513


def test_the_share_of_odd_places_is_of_those_that_the_method_chose():
    """Sinks 0 to 3 and the last eight of 32 are kept anyway; of 6, 8, 9 one is odd."""
    kept = np.array([0, 1, 2, 3, 6, 8, 9, *range(24, 32)])
    context = SimpleNamespace(
        prefill=SimpleNamespace(tokens=np.arange(32)), kept=[[kept]], evictable=slice(4, 24), document=5,
        backend=SimpleNamespace(shape=SimpleNamespace(layers=1)),
    )  # fmt: skip
    found = {row["metric"]: row["value"] for row in Kept().measure(context)}
    assert found["kept/odd"] == pytest.approx(1 / 3)
    assert found["kept/depth"] == pytest.approx(kept.mean() / 31)
