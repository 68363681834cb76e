import importlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from spectral_kv.calibration import QueryStatistics
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.tri import TriAttention, offsets
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.selection import Budget, select
from spectral_kv.storage.dense import Dense
from spectral_kv.xp import rows, to_numpy

FORMS = [(path, aggregation) for path in ("collapsed", "unrotated") for aggregation in ("mean", "max")]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}


def view(keys, rope, positions, statistics, evictable=None) -> LayerView:
    keys = torch.from_numpy(np.asarray(keys, dtype=np.float32))
    return LayerView(
        keys, keys, rope, positions, evictable or slice(0, keys.shape[1]), scaling=1, statistics=statistics
    )


def spread_statistics(rng, query_heads: int, bands: int = 8) -> QueryStatistics:
    """Means of queries that are neither all alike nor without direction."""
    z = rng.normal(size=(1, query_heads, bands, 50, 2)) @ np.array([1, 1j]) + 2 * rng.normal(
        size=(1, query_heads, bands, 1)
    )
    return QueryStatistics(z.mean(axis=-1), np.abs(z).mean(axis=-1))


@pytest.fixture
def layer(rng) -> LayerView:
    """Random keys of two KV heads after per-head eviction, four query heads, a rotation that scales."""
    rope = Rope(10_000.0 ** -(np.arange(8) / 8), 1.2)
    positions = np.sort(np.stack([rng.permutation(400)[:60] for _ in range(2)]), axis=1)
    keys = rope.rotate(rng.normal(size=(2, 60, 16)).astype(np.float32), positions)
    return view(keys, rope, positions, spread_statistics(rng, 4), slice(4, 50))


def golden(now: int = 20, key=(-0.29505042, 2.08984175, -1.38309264, -0.79533733)) -> LayerView:
    """Two bands worked by hand: mu = [1, 2i], m = [1.5, 2], key [1+i, 2-i] at position 10."""
    statistics = QueryStatistics(np.array([[[1, 2j]]]), np.array([[[1.5, 2.0]]]))
    return view([[key, (0, 0, 0, 0)]], Rope(np.array([1.0, 0.01])), np.array([10, now - 1]), statistics)


def of_key(scorer: TriAttention, layer: LayerView) -> float:
    return scorer.expectation(layer)[0, 0, 0].item()


@pytest.mark.parametrize("path", ["collapsed", "unrotated"])
def test_golden_numbers(path):
    norm = TriAttention(path=path, disable_trig=True)
    assert of_key(norm, golden()) == pytest.approx(0.70710678, abs=1e-6)
    assert of_key(replace(norm, disable_mlr=True), golden()) == pytest.approx(6.59345630, abs=1e-5)
    for distance, series in {1: -3.42258991, 2: -2.15718506, 4: -1.41125988}.items():
        one = of_key(TriAttention(1, path=path), golden(now=20 + distance - 1))
        assert one - of_key(norm, golden()) == pytest.approx(series, abs=1e-5)
    for largest, mean, peak in [(4, -1.62323817, -0.70415309), (65536, -1.26394002, 4.58580902)]:
        assert of_key(TriAttention(largest, path=path), golden()) == pytest.approx(mean, abs=1e-5)
        assert of_key(TriAttention(largest, "max", path), golden()) == pytest.approx(peak, abs=1e-5)
    interleaved = golden(key=(-0.29505042, -1.38309264, 2.08984175, -0.79533733))
    assert abs(of_key(TriAttention(path=path), interleaved) + 1.26394002) > 0.1


def test_offsets_are_the_seventeen_powers_of_two():
    assert offsets(65536).tolist() == [2.0**i for i in range(17)]
    assert offsets(65535).tolist() == [2.0**i for i in range(16)]
    assert offsets(1).tolist() == [1.0]


@pytest.mark.parametrize("path, aggregation", FORMS)
@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e6}, YARN],
    ids=["theta 1e4", "theta 1e6", "yarn"],
)
def test_concentrated_queries_give_the_logits_of_the_model(parameters, path, aggregation, rng):
    """If all calibration queries are equal, the expectation is the true logit, aggregated over the distances."""
    config = Qwen2Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=parameters
    )
    embedding = Qwen2RotaryEmbedding(config)
    rope = Rope(embedding.inv_freq.double().numpy(), float(embedding.attention_scaling))
    assert (rope.attention_scaling != 1) == (parameters is YARN)

    def rotated(x, positions):
        cos, sin = embedding(x, torch.as_tensor(positions)[None])
        return apply_rotary_pos_emb(x[None, None], x[None, None], cos, sin)[0][0, 0]

    q, k = torch.from_numpy(rng.normal(size=16)).float(), torch.from_numpy(rng.normal(size=(30, 16))).float()
    keys = rotated(k, np.arange(30))
    queries = rotated(q.expand(7, 16), 30 + offsets(64).astype(int))
    logits = queries @ keys.T / rope.attention_scaling  # the query's own factor is left out
    expected = logits.mean(dim=0) if aggregation == "mean" else logits.max(dim=0).values

    def expectation(mu):
        statistics = QueryStatistics(mu[None, None], np.abs(mu)[None, None])
        layer = view(keys[None], rope, np.arange(30), statistics)
        return TriAttention(64, aggregation, path).expectation(layer)[0, :, 0]

    q = q.double().numpy()
    torch.testing.assert_close(expectation(q[:8] + 1j * q[8:]), expected, atol=1e-4, rtol=0)
    assert (expectation(q[::2] + 1j * q[1::2]) - expected).abs().max() > 1  # channels paired as in GPT-J


@pytest.mark.parametrize("path", ["collapsed", "unrotated"])
def test_the_series_is_the_mean_logit_of_any_queries(path, rope, rng):
    """The logit is linear in the query, so the mean query gives the mean logit however much the queries spread."""
    queries, k = rng.normal(size=(40, 16)) + rng.normal(size=16), rng.normal(size=(1, 30, 16))
    keys = rope.rotate(k.astype(np.float32), np.arange(30))
    z = queries[:, :8] + 1j * queries[:, 8:]
    layer = view(keys, rope, np.arange(30), QueryStatistics(z.mean(axis=0)[None, None], np.abs(z).mean(0)[None, None]))
    scorer = TriAttention(256, path=path)
    series = (scorer.expectation(layer) - replace(scorer, disable_trig=True).expectation(layer))[0, :, 0]
    true = [
        rope.rotate(queries.astype(np.float32), np.full(40, 30 + distance)) @ keys[0].T for distance in offsets(256)
    ]
    np.testing.assert_allclose(series, np.mean(true, axis=(0, 1)), atol=1e-4)


@pytest.mark.parametrize("switches", [{}, {"disable_mlr": True}, {"disable_trig": True}], ids=str)
def test_all_forms_of_the_formula_agree(switches, layer):
    """Un-rotated keys and distances, rotated keys one distance at a time, and the mean phase of all distances."""
    mu, modulus = layer.statistics.of(0)
    z = to_numpy(layer.keys)[..., :8] + 1j * to_numpy(layer.keys)[..., 8:].astype(np.float64)
    z = np.repeat(z, 2, axis=0)  # [query_heads, tokens, bands]
    weight = (modulus if "disable_mlr" in switches else modulus - np.abs(mu))[:, None]
    norm = (weight * np.abs(z)).sum(axis=-1)
    turns = np.exp(1j * layer.rope.angles(layer.positions.max() + 1 + offsets(65536)))
    series = 0.0 if "disable_trig" in switches else 1.0
    each = [series * (mu * turn)[:, None].conj() * z for turn in turns]
    each = np.real(each).sum(axis=-1) + norm
    for aggregation, expected in {"mean": each.mean(axis=0), "max": each.max(axis=0)}.items():
        expected = expected.reshape(2, 2, 60).transpose(0, 2, 1)
        for path in ("collapsed", "unrotated"):
            found = TriAttention(65536, aggregation, path, **switches).expectation(layer)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
    if series:
        assert (each.max(axis=0) - each.mean(axis=0)).min() > 0.1  # the maximum can't be had from the mean phase


@pytest.mark.parametrize("path", ["collapsed", "unrotated"])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_next_position_counts_evicted_tokens(path, per_head, rope, rng):
    """Keys that survive score as they did in the full cache: 200 prompt tokens, 30 decoded, many evicted."""
    keys = rope.rotate(rng.normal(size=(2, 230, 16)).astype(np.float32), np.arange(230))
    statistics = spread_statistics(rng, 4)
    kept = np.sort([[*rng.permutation(200)[:20], *range(200, 230)] for _ in range(2)], axis=1)
    if not per_head:
        kept[1] = kept[0]
    full = view(keys, rope, np.arange(230), statistics)
    evicted = view(rows(keys, kept), rope, kept if per_head else kept[0], statistics)
    scorer = TriAttention(path=path)
    expected = rows(to_numpy(scorer.expectation(full)), kept)
    np.testing.assert_allclose(scorer.expectation(evicted), expected, rtol=1e-4, atol=1e-4)
    as_if_nothing_was_evicted = view(rows(keys, kept), rope, np.arange(50), statistics)
    assert np.abs(to_numpy(scorer.expectation(as_if_nothing_was_evicted)) - expected).max() > 0.5


@pytest.mark.parametrize("path, aggregation", FORMS)
def test_a_cache_that_was_evicted_and_decoded_scores_as_the_full_one(path, aggregation, backend, rng):
    """Prefill of 60, other tokens evicted in every layer and head, 12 decoded: the next position is 72."""
    tokens = rng.integers(2, 8000, size=72)
    kept = [torch.from_numpy(np.sort([rng.permutation(60)[:20] for _ in range(2)], axis=1)) for _ in range(2)]
    prefill = backend.prefill(tokens[:60], observe=1)
    caches = [backend.compress(prefill, chosen, Dense()) for chosen in (None, kept)]
    for cache in caches:
        backend.extend(cache, tokens[60:])
    full, evicted = (backend.contents(cache) for cache in caches)
    assert evicted.positions[0].shape == (2, 32)
    scorer, statistics = TriAttention(1024, aggregation, path), spread_statistics(rng, 4)
    # the first layer: its keys do not depend on what was evicted
    expected = scorer.expectation(view(full.keys[0], backend.rope, np.arange(72), statistics))
    found = scorer.expectation(view(evicted.keys[0], backend.rope, evicted.positions[0], statistics))
    torch.testing.assert_close(found, rows(expected, torch.from_numpy(evicted.positions[0])), rtol=1e-4, atol=1e-3)


def test_spread_queries_add_the_norm_of_the_key(rope, rng):
    keys = rng.normal(size=(1, 20, 16))
    bands = np.hypot(keys[0, :, :8], keys[0, :, 8:])
    layer = view(keys, rope, np.arange(20), QueryStatistics(np.zeros((1, 1, 8), complex), np.full((1, 1, 8), 2.0)))
    np.testing.assert_allclose(TriAttention().expectation(layer)[0, :, 0], 2 * bands.sum(axis=1), rtol=1e-5)


def test_spread_is_what_the_mean_query_leaves_of_the_modulus(rope, rng):
    """Queries of modulus 2 whose mean is 1.5 long are spread by the half; without the series nothing else counts."""
    keys = rng.normal(size=(1, 20, 16))
    bands = np.hypot(keys[0, :, :8], keys[0, :, 8:])
    mean = np.full((1, 1, 8), 1.5 * np.exp(2j))
    layer = view(keys, rope, np.arange(20), QueryStatistics(mean, np.full((1, 1, 8), 2.0)))
    for share, without_mean in ((0.5, False), (2.0, True)):
        scores = TriAttention(disable_trig=True, disable_mlr=without_mean).expectation(layer)[0, :, 0]
        np.testing.assert_allclose(scores, share * bands.sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("path, aggregation", FORMS)
def test_without_the_series_only_key_norms_count(path, aggregation, rope, rng):
    """Position, next position and phase of the key don't matter then; with the series each of them does."""
    keys, statistics = rng.normal(size=(2, 40, 16)).astype(np.float32), spread_statistics(rng, 4)
    positions = np.arange(40)
    variants = [
        view(keys, rope, positions + 700, statistics),
        view(keys, rope, np.sort(rng.permutation(90)[:40]), statistics),
        view(rope.rotate(keys, rng.integers(0, 500, size=40)), rope, positions, statistics),
    ]
    original = view(keys, rope, positions, statistics)
    for disable_trig in (True, False):
        scorer = TriAttention(64, aggregation, path, disable_trig)
        expected = scorer.expectation(original)
        assert (expected >= 0).all() or not disable_trig
        for variant in variants:
            assert torch.allclose(scorer.expectation(variant), expected, rtol=1e-4) == disable_trig


@pytest.mark.parametrize("path, aggregation", FORMS)
def test_shifting_all_positions_changes_nothing(path, aggregation, rope, rng):
    k, statistics = rng.normal(size=(2, 60, 16)).astype(np.float32), spread_statistics(rng, 4)
    positions = np.arange(60)

    def score(keys_at, now):
        layer = view(rope.rotate(k, keys_at), rope, keys_at + now - keys_at.max() - 1, statistics)
        return TriAttention(4096, aggregation, path).score(layer)

    here, there = score(positions, 60), score(positions + 1000, 1060)
    torch.testing.assert_close(there, here, atol=2e-3, rtol=0)
    assert (score(positions, 1060) - here).abs().max() > 0.1  # the next position moves, the rotation of keys does not


def test_a_key_that_one_head_of_the_group_wants_is_kept(rope, rng):
    """Four query heads on two KV heads: head 3 belongs to KV head 1."""
    keys = np.zeros((2, 50, 16))
    keys[:, :, 5] = rng.normal(size=(2, 50))
    keys[:, 17, 2] = 5.0
    modulus = np.zeros((1, 4, 8))
    modulus[0, :, 5] = 1.0
    modulus[0, 3, 2] = 10.0
    score = TriAttention().score(
        view(keys, rope, np.arange(50), QueryStatistics(np.zeros((1, 4, 8), complex), modulus))
    )
    assert score[1].argmax() == 17
    assert score[0].argmax() != 17


@pytest.mark.parametrize("path", ["collapsed", "unrotated"])
def test_every_query_head_speaks_for_its_own_kv_head(path, rope):
    """Query head h wants the token at 10 + h only; KV head g hears the heads 3 g, 3 g + 1 and 3 g + 2."""
    keys = np.zeros((2, 40, 16))
    for head in range(6):
        keys[:, 10 + head, head] = 1.0
    modulus = np.eye(6, 8)[None]
    layer = view(keys, rope, np.arange(40), QueryStatistics(np.zeros((1, 6, 8), complex), modulus))
    top = TriAttention(path=path).score(layer).topk(3, dim=1).indices.sort(dim=1).values
    assert top.tolist() == [[10, 11, 12], [13, 14, 15]]


def test_scores_are_standardised_over_the_evictable_tokens(rope, rng):
    keys = rng.normal(size=(2, 60, 16))
    keys[:, :4] *= 100  # sinks must not set the scale
    statistics = QueryStatistics(rng.normal(size=(1, 2, 8)) + 1j, rng.random((1, 2, 8)) + 3)
    score = TriAttention().score(view(keys, rope, np.arange(60), statistics, slice(4, 50)))
    np.testing.assert_allclose(score[:, 4:50].mean(dim=1), 0, atol=1e-4)
    np.testing.assert_allclose(score[:, 4:50].std(dim=1, correction=0), 1, atol=1e-4)


def test_protected_tokens_have_no_say_in_the_choice(layer):
    changed = layer.keys.clone()
    changed[:, :4], changed[:, 50:] = 100 * changed[:, :4], -30 * changed[:, 50:]
    budget = Budget(25, sinks=4, recent=10)
    kept = select(TriAttention().score(layer), budget)
    assert kept.shape == (2, 25)
    assert (kept.diff(dim=1) > 0).all()
    assert kept[:, :4].tolist() == [[0, 1, 2, 3]] * 2
    assert kept[:, -10:].tolist() == [list(range(50, 60))] * 2
    torch.testing.assert_close(select(TriAttention().score(replace(layer, keys=changed)), budget), kept)


def test_scale_and_shift_of_a_query_head_change_nothing(layer):
    @dataclass(frozen=True)
    class Mapped(TriAttention):
        """Every query head's logits on a scale of its own."""

        def expectation(self, layer):
            return super().expectation(layer) * torch.tensor([0.01, 50.0]) + torch.tensor([3.0, -70.0])

    expected = TriAttention().score(layer)
    torch.testing.assert_close(Mapped().score(layer), expected, atol=2e-3, rtol=0)
    budget = Budget(25, sinks=4, recent=10)
    torch.testing.assert_close(select(Mapped().score(layer), budget), select(expected, budget))


@pytest.mark.parametrize("path, aggregation", FORMS)
def test_scale_and_shift_of_the_statistics_of_a_query_head_change_nothing(path, aggregation, rope, rng):
    """All keys are of length 1 in the last band, so there its norm term adds the same to every key."""
    keys = rng.normal(size=(2, 60, 16)).astype(np.float32)
    keys[..., [7, 15]] /= np.hypot(keys[..., 7], keys[..., 15])[..., None]
    statistics = spread_statistics(rng, 4)
    scale, shift = np.array([0.02, 40.0, 1.0, 7.0]), np.array([0.0, 90.0, 11.0, 0.5])
    modulus = scale[:, None] * statistics.modulus[0]
    modulus[:, 7] += shift
    mapped = QueryStatistics(scale[:, None] * statistics.mu, modulus[None])
    layers = [view(keys, rope, np.arange(60), x, slice(4, 50)) for x in (statistics, mapped)]
    scorer, budget = TriAttention(65536, aggregation, path), Budget(25, sinks=4, recent=10)
    before, after = (scorer.expectation(x).numpy() for x in layers)
    changed = before * scale.reshape(2, 1, 2) + shift.reshape(2, 1, 2)
    np.testing.assert_allclose(after, changed, rtol=1e-4, atol=1e-3)
    expected = scorer.score(layers[0])
    torch.testing.assert_close(scorer.score(layers[1]), expected, atol=2e-3, rtol=0)
    kept = select(expected, budget).numpy()
    np.testing.assert_array_equal(select(scorer.score(layers[1]), budget), kept)
    assert (select(after.max(axis=-1), budget) != kept).any()  # without standardising the loudest head decides


def test_the_maximum_over_the_group_keeps_the_best_of_what_its_heads_would_keep(layer):
    """Every head picks its tokens, the union is ranked by the best score: the same set."""
    logits = TriAttention().expectation(layer)[:, 4:50].numpy().astype(np.float64)
    heads = (logits - logits.mean(axis=1, keepdims=True)) / logits.std(axis=1, keepdims=True)
    kept = select(TriAttention().score(layer), Budget(25, sinks=4, recent=10))[:, 4:-10].numpy() - 4
    for kv_head in range(2):
        picked = [set(np.argsort(-heads[kv_head, :, g])[:11]) for g in range(2)]
        assert picked[0] != picked[1]
        union = sorted(picked[0] | picked[1], key=lambda token: -heads[kv_head, token].max())
        assert kept[kv_head].tolist() == sorted(union[:11])


def test_every_layer_reads_its_own_statistics(layer, rng):
    first, second = spread_statistics(rng, 4), layer.statistics
    both = QueryStatistics(np.concatenate([first.mu, second.mu]), np.concatenate([first.modulus, second.modulus]))
    expected = TriAttention().score(layer)
    torch.testing.assert_close(TriAttention().score(replace(layer, statistics=both, index=1)), expected)
    assert (TriAttention().score(replace(layer, statistics=both, index=0)) - expected).abs().max() > 0.1


def test_with_one_query_head_a_kv_head_its_logits_decide(rope, rng):
    keys = rng.normal(size=(2, 60, 16))
    layer = view(keys, rope, np.arange(60), spread_statistics(rng, 2))
    top = TriAttention().expectation(layer)[..., 0].topk(20, dim=1).indices.sort(dim=1).values
    torch.testing.assert_close(select(TriAttention().score(layer), Budget(20, sinks=0, recent=0)), top)


@pytest.mark.parametrize("key, disable_trig", [(0.0, False), (0.0, True), (1.0, True)])
def test_constant_scores_are_numbers_and_keep_the_first_tokens(key, disable_trig, rope):
    statistics = QueryStatistics(np.ones((1, 2, 8), complex), np.full((1, 2, 8), 1.5))
    keys = np.zeros((1, 40, 16))
    keys[..., :8] = key
    layer = view(keys, rope, np.arange(40), statistics)
    score = TriAttention(disable_trig=disable_trig).score(layer)
    assert torch.isfinite(score).all()
    assert select(score, Budget(12, sinks=0, recent=3)).tolist() == [[*range(9), 37, 38, 39]]


def test_ties_go_to_the_first_tokens(rope, rng):
    keys = np.zeros((1, 40, 16))
    keys[0, 20:25] = rng.normal(size=(5, 16))
    statistics = QueryStatistics(np.zeros((1, 2, 8), complex), np.ones((1, 2, 8)))
    kept = select(
        TriAttention().score(view(keys, rope, np.arange(40), statistics)), Budget(tokens=12, sinks=0, recent=0)
    )
    assert kept.tolist() == [[*range(7), *range(20, 25)]]


@pytest.mark.parametrize("path, aggregation", FORMS)
def test_kinds_of_arrays_agree(path, aggregation, layer):
    scorer, budget = TriAttention(65536, aggregation, path), Budget(25, sinks=4, recent=10)
    keys, expected = layer.keys.numpy(), scorer.score(layer).numpy()
    kept = select(scorer.score(layer), budget).numpy()
    for kind in ("numpy", "mlx.core"):
        own = pytest.importorskip(kind) if kind != "numpy" else importlib.import_module(kind)
        score = scorer.score(replace(layer, keys=own.asarray(keys), values=own.asarray(keys)))
        assert type(score) is type(own.asarray(keys))
        np.testing.assert_allclose(np.asarray(score), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(np.asarray(select(score, budget)), kept)


def test_needs_statistics(rope):
    with pytest.raises(ValueError, match="statistics"):
        TriAttention().score(view(np.zeros((1, 20, 16)), rope, np.arange(20), None))


@pytest.mark.parametrize("wrong", [{"largest_offset": 0}, {"aggregation": "median"}, {"path": "fast"}], ids=str)
def test_refuses_parameters_in_a_sentence(wrong):
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"^{key}={value} (must be|is not known: choose)"):
        TriAttention(**wrong)


def test_the_wavelet_blend_goes_from_one_score_to_the_other(rope, rng):
    statistics = QueryStatistics(rng.normal(size=(1, 4, 8)) + 0j, np.full((1, 4, 8), 4.0))
    layer = view(rng.normal(size=(2, 120, 16)), rope, np.arange(120), statistics, slice(4, 100))

    def order(score):
        return score.argsort(dim=1).tolist()

    assert order(WaveletTri(tri_weight=0.0).score(layer)) == order(Wavelet().score(layer))
    assert order(WaveletTri(tri_weight=1.0).score(layer)) == order(TriAttention().score(layer))
    blend = WaveletTri(tri_weight=0.5).score(layer)
    assert order(blend) not in (order(Wavelet().score(layer)), order(TriAttention().score(layer)))
