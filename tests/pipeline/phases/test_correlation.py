from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from pipeline.phases.correlation import Correlation, spearman


def test_the_rank_correlation_is_that_of_scipy_ties_included(rng):
    a, b = rng.integers(0, 20, size=(2, 3, 100)).astype(float)
    a[0] = b[0] ** 3  # another scale, the same order
    a[1] = -b[1]
    found = spearman(a, b)
    assert found == pytest.approx([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert found[:2] == pytest.approx([1, -1])
    assert np.isnan(spearman(np.ones((1, 9)), a[:1, :9])).all()


def test_a_method_ranks_as_itself_and_a_blend_between_its_terms(run):
    phases = ["phase=[memory,perturbation,perplexity,correlation]"]

    def found(*overrides: str) -> dict[str, float]:
        return run(*overrides, *phases).metrics

    assert found("method=knorm")["correlation/knorm"] == pytest.approx(1)
    assert found("method=keydiff")["correlation/keydiff"] == pytest.approx(1)
    assert found("method=streaming")["correlation/recency"] == pytest.approx(1)
    weights = ["method.spectral_weight=0", "method.norm_weight=0.5", "method.recency_weight=0.0"]
    assert found("method=fourier", *weights)["correlation/knorm"] == pytest.approx(
        -1
    )  # it keeps large keys, Knorm small
    assert abs(found("method=random")["correlation/recency"]) < 0.25
    assert not any(name.startswith("correlation") for name in found("method=full"))


def test_layers_have_rows_and_their_mean_is_the_document_s(run):
    import mlflow

    table = mlflow.load_table(
        "rows.json", run_ids=[run("method=wavelet", "phase=[memory,perturbation,perplexity,correlation]").run_id]
    )
    table = table.assign(layer=pd.to_numeric(table["layer"]), value=pd.to_numeric(table["value"]))
    table = table[table["metric"] == "correlation/recency"]
    for _, document in table.groupby("document"):
        assert set(document["layer"].dropna()) == {0, 1}
        whole = document["value"][document["layer"].isna()]
        assert whole.tolist() == pytest.approx([document["value"][document["layer"].notna()].mean()])


def test_tokens_that_are_kept_anyway_have_no_part_in_it():
    """The scorers agree on the four tokens in the middle, and are opposite on those that no score decides about."""
    ours = np.array([[9.0, 8.0, 1.0, 2.0, 3.0, 4.0, -8.0, -9.0]])
    other = np.array([[-9.0, -8.0, 1.0, 2.0, 3.0, 4.0, 8.0, 9.0]])
    context = SimpleNamespace(scores=[ours], scores_by=lambda scorer: [other], evictable=slice(2, 6))
    found = {row["metric"]: row["value"] for row in Correlation().measure(context) if "layer" not in row}
    assert found == pytest.approx({f"correlation/{name}": 1 for name in ("knorm", "keydiff", "recency")})
    assert spearman(ours, other)[0] < 0
