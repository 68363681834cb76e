"""Compactor, DefensiveKV, KVzip and Ridge-KVzap against slow float64 references written from their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spectral_kv.scorers.base import LayerView, Repetition, projected_norms
from spectral_kv.scorers.compactor import Compactor, leverage, sketch
from spectral_kv.scorers.defensive import Defensive
from spectral_kv.scorers.kvzip import FIRST, LATER, KVzip
from spectral_kv.scorers.kvzip_plus import KVzipPlus
from spectral_kv.scorers.ridge_kvzap import KVzapWeights, Ridge, RidgeKVzap, features

KV_HEADS, GROUP, DIM, HIDDEN, SCALING = 2, 2, 16, 20, 0.3
HEADS = KV_HEADS * GROUP


def mlx_array(x):
    return pytest.importorskip("mlx.core").array(x)


ARRAYS = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])


def view(rng, rope, tokens: int, observed: int, make=np.asarray) -> LayerView:
    keys, values = (rng.normal(size=(2, KV_HEADS, tokens, DIM)) + rng.normal(size=(2, KV_HEADS, 1, DIM))).astype("f4")
    queries = (rng.normal(size=(HEADS, observed, DIM)) * [[[0.3]], [[1.0]], [[2.0]], [[0.6]]]).astype("f4")
    projection = rng.normal(size=(HEADS, DIM, HIDDEN)).astype("f4")
    return LayerView(
        make(keys), make(values), rope, np.arange(tokens), slice(2, tokens - 3), scaling=SCALING,
        queries=make(queries), projection=make(projection),
    )  # fmt: skip


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pooled(x: np.ndarray, kernel: int) -> np.ndarray:
    return np.convolve(x, np.ones(kernel) / kernel, mode="same")


@ARRAYS
def test_leverage_is_the_diagonal_of_the_hat_matrix(make, rng):
    x = rng.normal(size=(2, 60, 5)).astype("f4")
    hat = [np.diag(y @ np.linalg.pinv(y)) for y in x.astype(float)]
    np.testing.assert_allclose(np.asarray(leverage(make(x), 0.0)), hat, rtol=1e-4)
    assert np.asarray(leverage(make(x), 0.0)).sum(-1) == pytest.approx(5, rel=1e-4)  # its trace is the rank
    assert np.asarray(leverage(make(x), 1.0)).sum() < 9


@ARRAYS
def test_compactor_equals_its_definition(make, rng, rope):
    layer = view(rng, rope, 50, 50)
    scorer = Compactor(chunk=16, rank=8)
    found = np.asarray(scorer.score(view(np.random.default_rng(0), rope, 50, 50, make)))
    plain = layer.unrotated.astype(float)
    queries = layer.queries.astype(float).reshape(KV_HEADS, GROUP, 50, DIM)
    for head in range(KV_HEADS):
        x = (plain[head] - plain[head].mean(0)) @ sketch(DIM, 8, 0).astype(float)
        outlying = np.diag(x @ np.linalg.inv(x.T @ x) @ x.T)
        seen = np.zeros(50)
        for start in range(0, 50, 16):
            part = slice(start, min(start + 16, 50))
            for member in range(GROUP):
                logits = SCALING * queries[head, member, part] @ layer.keys[head, part].astype(float).T
                seen[part] += softmax(logits).sum(0) / GROUP
        looked_at = pooled(seen * np.linalg.norm(layer.values[head].astype(float), axis=-1), 3)
        parts = [(y - y[2:47].mean()) / y[2:47].std() for y in (outlying, looked_at)]
        np.testing.assert_allclose(found[head], 0.35 * parts[0] + parts[1], rtol=2e-3, atol=2e-3)


def test_compactor_prefers_a_key_that_is_like_no_other(rng, rope):
    layer = view(rng, rope, 50, 50)
    layer.keys[:, 20] = 6 * rng.normal(size=(KV_HEADS, DIM))
    assert (leverage(layer.unrotated, 0.0).argmax(-1) == 20).all()


@ARRAYS
def test_defensive_equals_its_definition(make, rng, rope):
    layer = view(rng, rope, 50, 12)
    found = np.asarray(Defensive(window=12).score(view(np.random.default_rng(0), rope, 50, 12, make)))
    risk, value = np.zeros((KV_HEADS, 38)), np.zeros((KV_HEADS, 38))
    for kv_head in range(KV_HEADS):
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for query in range(12):
                logits = SCALING * layer.keys[kv_head, : 39 + query].astype(float) @ layer.queries[head, query]
                weights = softmax(logits)[:38]
                smooth = pooled(weights, 5)
                risk[kv_head] = np.maximum(risk[kv_head], smooth / smooth.sum() * weights.sum())
            outputs = layer.values[kv_head, :38].astype(float) @ layer.projection[head].astype(float)
            value[kv_head] += np.abs(outputs).sum(-1) / GROUP
    risk = np.maximum(risk, risk.mean(-1, keepdims=True))
    np.testing.assert_allclose(found[:, :38], risk * value / value.sum(0), rtol=1e-3)
    assert (found[:, 38:] > found[:, :38].max()).all()


def test_defensive_keeps_what_one_query_of_one_head_looks_at(rng, rope):
    layer = view(rng, rope, 50, 12)
    layer.keys[0, 20] = layer.queries[1, 4] = 9 * np.eye(DIM)[3]
    alone = replace(layer, keys=layer.keys[:1], values=layer.values[:1], queries=layer.queries[:GROUP])
    assert Defensive(window=12, kernel=1).score(alone)[0, :38].argmax() == 20


def test_norms_after_the_projection(rng):
    values, projection = rng.normal(size=(KV_HEADS, 30, DIM)), rng.normal(size=(HEADS, DIM, HIDDEN))
    outputs = np.stack([values[h // GROUP] @ projection[h] for h in range(HEADS)])
    for order in (1, 2):
        found = projected_norms(values.astype("f4"), projection.astype("f4"), order)
        np.testing.assert_allclose(found, np.linalg.norm(outputs, order, axis=-1), rtol=1e-4)


def repetition(rng, make=np.asarray, tokens=40, span=slice(16, 32), fed=21) -> Repetition:
    arrays = [rng.normal(size=(heads, count, DIM)).astype("f4") for heads, count in
              ((KV_HEADS, tokens), (KV_HEADS, tokens), (HEADS, fed), (KV_HEADS, fed))]  # fmt: skip
    keys, values, queries, fed_keys = (make(x) for x in arrays)
    inputs, projection = (rng.random(fed) + 0.5).astype("f4"), rng.normal(size=(HEADS, DIM, HIDDEN)).astype("f4")
    return Repetition(keys, values, span, queries, fed_keys, make(inputs), SCALING, make(projection))


@ARRAYS
@pytest.mark.parametrize("plus", [False, True])
def test_kvzip_is_the_largest_weight_over_sinks_part_and_repetition(plus, make, rng):
    seen = repetition(rng)
    scorer = KVzipPlus() if plus else KVzip()
    found = np.asarray(scorer.repeated(repetition(np.random.default_rng(0), make)))
    for kv_head in range(KV_HEADS):
        expected = np.zeros(16)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            outputs = np.linalg.norm(seen.values[kv_head, 16:32].astype(float) @ seen.projection[head], axis=-1)
            for fed in range(21):
                own = (seen.keys[kv_head, :4], seen.keys[kv_head, 16:32], seen.fed_keys[kv_head, : fed + 1])
                weights = softmax(SCALING * np.concatenate(own).astype(float) @ seen.queries[head, fed])[4:20]
                expected = np.maximum(expected, weights * (outputs / seen.inputs[fed] if plus else 1))
        np.testing.assert_allclose(found[kv_head], expected, rtol=1e-3)


def test_kvzip_scores_sinks_highest(rng):
    scores = KVzip().repeated(repetition(rng, span=slice(0, 16)))
    assert (scores[:, :4] >= 1).all() and (scores[:, 4:] < 1).all()


def test_kvzip_has_every_part_of_a_prompt_repeated_once():
    tokens = np.arange(100, 150)
    words = {FIRST: np.array([1, 2]), LATER: np.array([3]), "\n": np.array([4])}
    parts = list(KVzip(chunk=20, lead=2, sinks=4).repetitions(tokens, words.get))
    assert [list(range(*span.indices(50))) for span, _ in parts] == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]
    assert parts[0][1].tolist() == [1, 2, 4, *range(104, 120)]  # no BOS token in the midst of a text
    assert parts[1][1].tolist() == [3, 118, 119, 4, *range(120, 140)]


def test_kvzip_keeps_what_is_repeated():
    """The second half of the prompt is the first again, between them are tokens that nothing repeated looks for."""
    code = np.eye(DIM, dtype="f4")
    text = [*range(6), *range(6, 16), *range(6)]  # six words, ten others, the six words
    keys = np.stack([20 * code[text]] * KV_HEADS)
    fed = np.stack([code[[0, 1, 2, 3, 4, 5]]] * HEADS)  # queries look for the six words
    seen = Repetition(keys, keys, slice(0, 22), fed, np.zeros((KV_HEADS, 6, DIM), "f4"), np.ones(6, "f4"), 1.0)
    scores = KVzip(sinks=0).repeated(seen)
    repeated, others = scores[:, [*range(6), *range(16, 22)]], scores[:, 6:16]
    np.testing.assert_allclose(repeated, 0.5, rtol=1e-5)  # both copies share the weight
    assert others.max() < 1e-6


@ARRAYS
def test_kvzip_scores_by_the_best_of_neighbours_sinks_apart(make, rng, rope):
    gathered = rng.random((KV_HEADS, 50)).astype("f4")
    gathered[:, :4] = 1
    layer = replace(view(rng, rope, 50, 1, make), gathered=make(gathered))
    found = np.asarray(KVzip(kernel=5).score(layer))
    expected = [[*row[:4], *(row[max(i - 2, 4) : i + 3].max() for i in range(4, 50))] for row in gathered]
    np.testing.assert_array_equal(found, np.array(expected, "f4"))
    np.testing.assert_array_equal(np.asarray(KVzip().score(layer)), gathered)


def test_kvzip_without_a_repetition_says_so(rng, rope):
    with pytest.raises(ValueError, match="nothing was repeated"):
        KVzip().score(view(rng, rope, 50, 1))


@ARRAYS
def test_ridge_kvzap_finds_a_linear_map_again(make, rng, rope, tmp_path):
    truth = rng.normal(size=(1, KV_HEADS, 2 * DIM + 3)) / 10
    ridge = Ridge(1, KV_HEADS, 2 * DIM + 3)
    for _ in range(4):
        layer = view(rng, rope, 200, 1)
        ridge.add(layer, np.exp(np.clip((features(layer) @ truth[0, :, :, None])[..., 0], -13, None)))
    fitted = ridge.fit(1e-9, model="this")
    assert float(fitted.metadata["variance"]) > 0.99
    fitted.save(tmp_path / "maps.safetensors")
    layer = view(rng, rope, 50, 1)
    expected = (features(layer) @ truth[0, :, :, None])[..., 0]
    made = replace(layer, keys=make(layer.keys), values=make(layer.values))
    found = np.asarray(RidgeKVzap(str(tmp_path / "maps.safetensors")).score(made))
    np.testing.assert_allclose(found, expected, atol=0.02)
    second = replace(
        made, keys=made.keys[1:], values=made.values[1:], first_head=1
    )  # a head on its own has its own map
    np.testing.assert_allclose(np.asarray(RidgeKVzap(str(tmp_path / "maps.safetensors")).score(second))[0], found[1],
                               atol=1e-4)  # fmt: skip


def test_ridge_kvzap_refuses_what_does_not_fit(rng, rope, tmp_path):
    (tmp_path / "junk").write_bytes(b"no")
    with pytest.raises(ValueError, match="does not hold maps"):
        KVzapWeights.load(tmp_path / "junk")
    KVzapWeights(np.zeros((1, KV_HEADS, 7))).save(tmp_path / "small")
    with pytest.raises(ValueError, match="fit them to this model"):
        RidgeKVzap(str(tmp_path / "small")).score(view(rng, rope, 50, 1))
    with pytest.raises(ValueError, match="weights= is not given"):
        RidgeKVzap().score(view(rng, rope, 50, 1))


@pytest.mark.parametrize(
    "method, settings",
    [
        (Compactor, {"rank": 0}),
        (Compactor, {"kernel": 2}),
        (Compactor, {"jitter": -1.0}),
        (Defensive, {"window": 0}),
        (Defensive, {"kernel": 4}),
        (KVzip, {"chunk": 0}),
        (KVzip, {"lead": -1}),
        (KVzip, {"kernel": 4}),
    ],
)
def test_impossible_settings_are_refused(method, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)
