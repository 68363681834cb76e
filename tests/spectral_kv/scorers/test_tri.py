import numpy as np
import pytest
import torch

from spectral_kv.calibration import QueryStatistics
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.tri import TriAttention, offsets
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_tri import WaveletTri


def view(keys, rope, positions, statistics, evictable=None) -> LayerView:
    keys = torch.from_numpy(np.asarray(keys, dtype=np.float32))
    return LayerView(keys, keys, rope, positions, evictable or slice(0, keys.shape[1]), statistics=statistics)


def test_golden_number():
    """Two bands worked by hand: mu = [1, 2i], m = [1.5, 2], key [1+i, 2-i] at position 10, next position 20."""
    rope = Rope(np.array([1.0, 0.01]))
    key = [-0.29505042, 2.08984175, -1.38309264, -0.79533733]
    statistics = QueryStatistics(np.array([[[1, 2j]]]), np.array([[[1.5, 2.0]]]))
    layer = view([[key, [0, 0, 0, 0]]], rope, np.array([10, 19]), statistics)
    assert TriAttention(65536).expectation(layer)[0, 0, 0].item() == pytest.approx(-1.26394002, abs=1e-5)
    assert TriAttention(4).expectation(layer)[0, 0, 0].item() == pytest.approx(-1.62323817, abs=1e-5)


def test_offsets_are_the_seventeen_powers_of_two():
    assert offsets(65536).tolist() == [2.0**i for i in range(17)]


@pytest.mark.parametrize("theta, scaling", [(1e4, 1.0), (1e6, 1.2)])
def test_concentrated_queries_give_the_exact_mean_logit(theta, scaling, rng):
    """If all calibration queries are equal, the expectation is the true logit, averaged over the distances."""
    rope = Rope(theta ** -(np.arange(8) / 8), scaling)
    q, k = rng.normal(size=16), rng.normal(size=(1, 30, 16))
    positions = np.arange(30)
    keys = rope.rotate(k.astype(np.float32), positions)
    mu = q[:8] + 1j * q[8:]
    layer = view(keys, rope, positions, QueryStatistics(mu[None, None], np.abs(mu)[None, None]))
    logits = []
    for distance in offsets(4096):
        query = rope.rotate(q[None].astype(np.float32), np.array([30 + distance]))
        logits.append((query * keys[0]).sum(axis=-1))
    expected = np.mean(logits, axis=0) / scaling  # the query's own factor drops out of the ranking
    np.testing.assert_allclose(TriAttention(4096).expectation(layer)[0, :, 0].numpy(), expected, atol=2e-3)


def test_spread_queries_add_the_norm_of_the_key(rope, rng):
    keys = rng.normal(size=(1, 20, 16))
    bands = np.hypot(keys[0, :, :8], keys[0, :, 8:])
    layer = view(keys, rope, np.arange(20), QueryStatistics(np.zeros((1, 1, 8), complex), np.full((1, 1, 8), 2.0)))
    np.testing.assert_allclose(TriAttention().expectation(layer)[0, :, 0], 2 * bands.sum(axis=1), rtol=1e-5)


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


def test_scores_are_standardised_over_the_evictable_tokens(rope, rng):
    keys = rng.normal(size=(2, 60, 16))
    keys[:, :4] *= 100  # sinks must not set the scale
    statistics = QueryStatistics(rng.normal(size=(1, 2, 8)) + 1j, rng.random((1, 2, 8)) + 3)
    score = TriAttention().score(view(keys, rope, np.arange(60), statistics, slice(4, 50)))
    np.testing.assert_allclose(score[:, 4:50].mean(dim=1), 0, atol=1e-4)
    np.testing.assert_allclose(score[:, 4:50].std(dim=1, correction=0), 1, atol=1e-4)


def test_constant_scores_give_numbers(rope):
    layer = view(
        np.zeros((1, 20, 16)), rope, np.arange(20), QueryStatistics(np.ones((1, 1, 8), complex), np.ones((1, 1, 8)))
    )
    assert torch.isfinite(TriAttention().score(layer)).all()


def test_needs_statistics(rope):
    with pytest.raises(ValueError, match="statistics"):
        TriAttention().score(view(np.zeros((1, 20, 16)), rope, np.arange(20), None))


def test_the_wavelet_blend_goes_from_one_score_to_the_other(rope, rng):
    statistics = QueryStatistics(rng.normal(size=(1, 4, 8)) + 0j, np.full((1, 4, 8), 4.0))
    layer = view(rng.normal(size=(2, 120, 16)), rope, np.arange(120), statistics, slice(4, 100))

    def order(score):
        return score.argsort(dim=1).tolist()

    assert order(WaveletTri(tri_weight=0.0).score(layer)) == order(Wavelet().score(layer))
    assert order(WaveletTri(tri_weight=1.0).score(layer)) == order(TriAttention().score(layer))
    blend = WaveletTri(tri_weight=0.5).score(layer)
    assert order(blend) not in (order(Wavelet().score(layer)), order(TriAttention().score(layer)))
