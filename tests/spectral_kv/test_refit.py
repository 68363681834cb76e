"""Kept tokens fitted to what all of them gave."""

import numpy as np
import pytest
import torch

from spectral_kv.attention import attention_output
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.refit import Refit

HEADS, GROUP, TOKENS, DIM, SCALING = 2, 2, 120, 16, 0.25


@pytest.fixture
def layer(rng):
    """Keys and values of two heads, and queries that look for some of them."""
    keys, values = (rng.normal(size=(HEADS, TOKENS, DIM)).astype("f4") for _ in range(2))
    values += rng.normal(size=(HEADS, 1, DIM)).astype("f4")
    queries = (1.5 * rng.normal(size=(HEADS * GROUP, 200, DIM))).astype("f4")
    return keys, values, queries


def chosen(rng, count: int) -> np.ndarray:
    return np.stack([np.sort(rng.permutation(TOKENS)[:count]) for _ in range(HEADS)])


def outputs(layer, kept, refitted, queries):
    """Outputs over the whole prompt, and over kept tokens with what they were given."""
    keys, values, _ = layer
    own = (
        np.take_along_axis(values, kept[..., None], 1)
        if refitted is None or refitted.values is None
        else refitted.values
    )
    bias = None if refitted is None else refitted.bias
    whole = attention_output(queries, keys, values, SCALING)
    return whole, attention_output(queries, np.take_along_axis(keys, kept[..., None], 1), own, SCALING, bias)


@pytest.mark.parametrize("kind", ["bias", "bias_values"])
def test_nothing_changes_where_nothing_is_evicted(kind, layer, rng):
    kept = np.tile(np.arange(TOKENS), (HEADS, 1))
    refitted = Refit(kind).layer(*layer[:2], kept, layer[2][:, -50:], SCALING)
    np.testing.assert_allclose(refitted.bias, 0, atol=1e-6)
    whole, ours = outputs(layer, kept, refitted, layer[2])
    assert attention_output_perturbation(ours, whole).max() < 1e-5


def test_a_bias_keeps_the_partition_sum_of_its_reference_queries(layer, rng):
    """Fewer queries than kept tokens, which can be met all."""
    keys, values, queries = layer[0], layer[1], layer[2] / 3
    kept = chosen(rng, 100)
    found = Refit("bias", strength=1e-9, largest=30.0).layer(keys, values, kept, queries[:, -10:], SCALING)
    for head in range(HEADS):
        for member in range(GROUP):
            for place in range(190, 200):
                row = np.exp(SCALING * keys[head].astype(float) @ queries[head * GROUP + member, place])
                assert (row[kept[head]] @ np.exp(found.bias[head])) / row.sum() == pytest.approx(1, abs=1e-3)


def test_a_bias_makes_up_for_evicted_copies(rng):
    """Of four equal tokens each one is kept: it stands for four, whoever asks."""
    keys = np.repeat(rng.normal(size=(1, 30, DIM)), 4, axis=1).astype("f4")
    queries = rng.normal(size=(1, 120, DIM)).astype("f4")
    kept = np.arange(0, 120, 4)
    seen = np.concatenate([np.arange(120), np.arange(120)])  # all of it, by queries that come after it
    doubled = Refit("bias", strength=1e-9).head(keys[0][seen], keys[0][seen], kept, queries, SCALING)[0]
    np.testing.assert_allclose(np.exp(doubled)[:15].mean(), 8, rtol=0.3)


def test_a_refit_lowers_the_perturbation_for_queries_it_has_not_seen(layer, rng):
    """Random tokens; paired over 20 draws of them, a 95 % interval of the difference below 0.

    Of values; a bias alone, which is fitted to denominators, may not raise it, and lowers what those miss by half.
    """
    keys, values, queries = layer
    differences = {"bias": [], "bias_values": []}
    missed = []
    for _ in range(20):
        kept = chosen(rng, 40)
        errors = {}
        for kind in (None, "bias", "bias_values"):
            fitted = kind and Refit(kind, queries=100).layer(keys, values, kept, queries[:, :100], SCALING)
            whole, ours = outputs(layer, kept, fitted, queries[:, 100:])
            errors[kind] = attention_output_perturbation(ours, whole).mean()
            if kind == "bias":
                missed.append([missing(layer, kept, bias, queries[:, 100:]) for bias in (0 * fitted.bias, fitted.bias)])
        for kind, found in differences.items():
            found.append(errors[kind] - errors[None])
    for kind, most in (("bias", 0.01), ("bias_values", 0)):
        found = np.array(differences[kind])
        assert found.mean() + 2.1 * found.std(ddof=1) / len(found) ** 0.5 < most, kind
    plain, fitted = np.mean(missed, axis=0)
    assert fitted < plain / 2


def missing(layer, kept, bias, queries) -> float:
    """Mean distance between logarithms of the denominator over kept tokens and over all."""
    keys, found = layer[0], []
    for head in range(HEADS):
        logits = SCALING * queries[head * GROUP : (head + 1) * GROUP].astype(float) @ keys[head].T
        held = np.exp(logits[..., kept[head]] + bias[head]).sum(-1)
        found.append(np.abs(np.log(held / np.exp(logits).sum(-1))).mean())
    return float(np.mean(found))


def test_what_is_missing_does_not_go_to_sinks(layer, rng):
    """A first token that all look at and that has no value: the others would lose their part of the output to it."""
    keys, values, queries = (x.copy() for x in layer)
    queries[..., 0], keys[:, 0] = 4.0, 0.0
    keys[:, 0, 0], values[:, 0] = 4.5, 0.0
    kept = np.stack([np.append(0, np.sort(1 + rng.permutation(TOKENS - 1)[:40])) for _ in range(HEADS)])
    fitted = Refit("bias").layer(keys, values, kept, queries[:, :100], SCALING)
    given = (keys, values, queries)
    plain, ours = (outputs(given, kept, f, queries[:, 100:]) for f in (None, fitted))
    before, after = (attention_output_perturbation(o, whole).mean() for whole, o in (plain, ours))
    assert after < 1.02 * before
    assert (
        missing(given, kept, fitted.bias, queries[:, 100:])
        < missing(given, kept, 0 * fitted.bias, queries[:, 100:]) / 2
    )


def test_reference_queries_stand_after_the_prompt(rng, rope):
    """The same contents at other positions: query i of the last three at TOKENS + i."""
    plain = rng.normal(size=(4, 5, DIM)).astype("f4")
    queries = rope.rotate(plain, np.arange(TOKENS - 5, TOKENS))
    found = Refit(queries=3).reference(queries, TOKENS, rope)
    np.testing.assert_allclose(found, rope.rotate(plain[:, 2:], np.arange(TOKENS, TOKENS + 3)), atol=1e-5)


def test_heads_of_different_lengths_are_fitted_each_on_its_own(layer):
    keys, values, queries = layer
    kept = [np.arange(0, TOKENS, 2), np.arange(0, TOKENS, 3)]
    apart = Refit().layer(keys, values, kept, queries[:, -64:], SCALING)
    assert [b.shape for b in apart.bias] == [(60,), (40,)] and [v.shape for v in apart.values] == [(60, DIM), (40, DIM)]
    alone = Refit().layer(keys[1:], values[1:], kept[1][None], queries[GROUP:, -64:], SCALING)
    np.testing.assert_allclose(apart.bias[1], alone.bias[0], rtol=1e-5)
    np.testing.assert_allclose(apart.values[1], alone.values[0], rtol=1e-4, atol=1e-5)


def test_torch_and_numpy_agree(layer, rng):
    kept = chosen(rng, 40)
    ours = Refit().layer(*layer[:2], kept, layer[2][:, -64:], SCALING)
    theirs = Refit().layer(*(torch.from_numpy(x) for x in (*layer[:2], kept, layer[2][:, -64:])), SCALING)
    np.testing.assert_allclose(theirs.bias.numpy(), ours.bias, atol=1e-4)
    np.testing.assert_allclose(theirs.values.numpy(), ours.values, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"kind": "some"}, {"queries": 0}, {"largest": 0.0}, {"strength": 0.0}, {"value_strength": -1.0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Refit(**settings)
