"""Published baselines against slow float64 references written from their definitions, one query and key at a time."""

import numpy as np
import pytest

from spectral_kv import attention
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.h2o import H2O
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.observed_attention import ObservedAttention
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.tova import Tova

KV_HEADS, GROUP, DIM, SCALING = 2, 2, 16, 0.3


def view(rng, rope, tokens: int, observed: int) -> LayerView:
    """Random keys, values and queries; every head has keys and queries of its own mean and size."""
    keys, values = rng.normal(size=(2, KV_HEADS, tokens, DIM)) + rng.normal(size=(2, KV_HEADS, 1, DIM))
    queries = rng.normal(size=(KV_HEADS * GROUP, observed, DIM)) + rng.normal(size=(KV_HEADS * GROUP, 1, DIM))
    queries *= np.array([0.3, 1.0, 2.0, 0.6])[:, None, None]
    keys, values, queries = (x.astype(np.float32) for x in (keys, values, queries))
    return LayerView(keys, values, rope, np.arange(tokens), slice(0, tokens), scaling=SCALING, queries=queries)


def causal_row(layer: LayerView, head: int, query: int) -> np.ndarray:
    """Attention `[tokens]` of one of the last queries over what is not after it."""
    keys = layer.keys[head // GROUP].astype(np.float64)
    tokens, observed = layer.tokens, layer.queries.shape[1]
    row = np.zeros(tokens)
    seen = tokens - observed + query + 1
    row[:seen] = np.exp(layer.scaling * keys[:seen] @ layer.queries[head, query].astype(np.float64))
    return row / row.sum()


def test_knorm_is_minus_the_length_of_the_key(rng, rope):
    layer = view(rng, rope, 50, 1)
    for head in range(KV_HEADS):
        expected = [-(sum(float(x) ** 2 for x in key) ** 0.5) for key in layer.keys[head]]
        np.testing.assert_allclose(Knorm().score(layer)[head], expected, rtol=1e-6)


def test_keydiff_is_minus_the_cosine_to_the_mean_direction(rng, rope):
    layer = view(rng, rope, 50, 1)
    for head in range(KV_HEADS):
        directions = [key / np.sqrt(key @ key) for key in layer.keys[head].astype(np.float64)]
        anchor = sum(directions) / len(directions)
        expected = [-(direction @ anchor) / np.sqrt(anchor @ anchor) for direction in directions]
        np.testing.assert_allclose(KeyDiff().score(layer)[head], expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_snapkv_pools_the_mean_vote_of_the_window(kernel, rng, rope):
    tokens, window = 50, 7
    layer = view(rng, rope, tokens, window)
    score = SnapKV(window, kernel).score(layer)
    before = tokens - window
    for kv_head in range(KV_HEADS):
        votes = np.zeros(before)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for query in range(window):
                votes += causal_row(layer, head, query)[:before] / (GROUP * window)
        for token in range(before):
            neighbours = range(token - kernel // 2, token + kernel // 2 + 1)
            expected = sum(votes[i] for i in neighbours if 0 <= i < before) / kernel  # zeros beyond the ends
            assert score[kv_head, token] == pytest.approx(expected, rel=1e-4)
        assert (score[kv_head, before:] == 1).all()
        assert score[kv_head, :before].max() < 1  # the window is kept before anything else


def test_tova_is_the_vote_of_the_last_query_over_all_heads(rng, rope):
    layer = view(rng, rope, 50, 1)
    expected = sum(causal_row(layer, head, 0) for head in range(KV_HEADS * GROUP)) / (KV_HEADS * GROUP)
    score = Tova().score(layer)
    for kv_head in range(KV_HEADS):
        np.testing.assert_allclose(score[kv_head], expected, rtol=1e-4)


def accumulated(layer: LayerView) -> np.ndarray:
    """Column sums of the causal attention matrix, the mean over the query heads of a KV head."""
    total = np.zeros(layer.keys.shape[:2])
    for head in range(KV_HEADS * GROUP):
        for query in range(layer.queries.shape[1]):
            total[head // GROUP] += causal_row(layer, head, query) / GROUP
    return total


@pytest.mark.parametrize(
    "tokens, observed",
    [(60, 60), (512, 512), (513, 513), (1100, 1100), (900, 700)],
    ids=["one chunk", "just one chunk", "one query more", "two chunks and a rest", "a window of two chunks"],
)
def test_h2o_sums_the_columns_of_the_causal_attention_matrix(tokens, observed, rng, rope):
    layer = view(rng, rope, tokens, observed)
    np.testing.assert_allclose(H2O().score(layer), accumulated(layer), rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 61])
def test_the_chunk_of_h2o_changes_nothing(chunk, monkeypatch, rng, rope):
    layer = view(rng, rope, 60, 60)
    monkeypatch.setattr(
        attention, "blocks", lambda length, *_: [slice(i, min(i + chunk, length)) for i in range(0, length, chunk)]
    )
    score = H2O().score(layer)
    np.testing.assert_allclose(score, accumulated(layer), rtol=1e-4)
    np.testing.assert_allclose(score.sum(axis=1), 60, rtol=1e-4)  # every query gives away a weight of one


@pytest.mark.parametrize("observed", [60, 25])
def test_observed_attention_is_the_mean_over_the_queries_that_could_see_the_token(observed, rng, rope):
    layer = view(rng, rope, 60, observed)
    able = np.array([sum(token <= 60 - observed + query for query in range(observed)) for token in range(60)])
    assert able.min() == 1 and able.max() == observed
    np.testing.assert_allclose(ObservedAttention().score(layer), accumulated(layer) / able, rtol=1e-4)


def test_observed_attention_does_not_prefer_what_came_early(rng):
    """Queries and keys that tell nothing: every query spreads its weight evenly."""
    layer = view(rng, Rope(np.zeros(DIM // 2)), 60, 60)
    layer.queries = np.zeros_like(layer.queries)
    even = [np.mean(1 / np.arange(token + 1, 61)) for token in range(60)]
    np.testing.assert_allclose(ObservedAttention().score(layer)[0], even, rtol=1e-5)
    np.testing.assert_allclose(H2O().score(layer)[0], np.array(even) * np.arange(60, 0, -1), rtol=1e-5)


GATHERERS = [H2O(), ObservedAttention(), ExpectedAttention(epsilon=0.01)]


@pytest.mark.parametrize("scorer", GATHERERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("chunk", [1, 3, 25, 60])
def test_what_is_gathered_chunk_by_chunk_gives_the_scores_of_all_queries(scorer, chunk, rng, rope):
    layer = view(rng, rope, 60, 60)
    gathered = None
    for start in range(0, 60, chunk):
        stop = min(start + chunk, 60)
        seen = LayerView(
            layer.keys[:, :stop], layer.values[:, :stop], rope, np.arange(stop), slice(None), scaling=SCALING,
            queries=layer.queries[:, start:stop], gathered=gathered,
        )  # fmt: skip
        gathered = scorer.gather(seen)
    done = LayerView(
        layer.keys, layer.values, rope, layer.positions, layer.evictable, scaling=SCALING, gathered=gathered
    )
    np.testing.assert_allclose(scorer.score(done), scorer.score(layer), rtol=1e-4)


def expected_weights(layer: LayerView, queries: np.ndarray, future: int, sinks: int = 0) -> np.ndarray:
    """`softmax(mu' k s + s^2 k' Sigma k / 2)` `[query_heads, tokens]` of un-rotated `queries`, in float64.

    Over the keys after the sinks.
    """
    inv_freq = layer.rope.inv_freq
    turn = np.zeros((DIM, DIM))
    for step in range(future):
        for f in range(DIM // 2):
            angle = (layer.positions[-1] + 1 + step) * inv_freq[f]
            pair = np.ix_([f, f + DIM // 2], [f, f + DIM // 2])
            turn[pair] += np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / future
    weights = np.zeros((KV_HEADS * GROUP, layer.tokens))
    for head in range(KV_HEADS * GROUP):
        q = queries[head].astype(np.float64)
        mean = sum(q) / len(q)
        covariance = sum(np.outer(x - mean, x - mean) for x in q) / len(q)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        s, keys = layer.scaling, layer.keys[head // GROUP].astype(np.float64)
        logits = np.array([s * mean @ k + s**2 * k @ covariance @ k / 2 for k in keys])
        logits[:sinks] = -np.inf
        weights[head] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return weights


@pytest.mark.parametrize("observed, left_out", [(60, 4), (25, 0)], ids=["all but the sinks", "a window"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_expected_attention_equals_its_definition(observed, left_out, epsilon, rng, rope):
    layer = view(rng, rope, 60, observed)
    unrotated = layer.queries
    layer.queries = rope.rotate(unrotated, np.arange(60 - observed, 60))
    weights = expected_weights(layer, unrotated[:, left_out:], future=9, sinks=4)
    score = ExpectedAttention(horizon=9, sinks=4, epsilon=epsilon).score(layer)
    for kv_head in range(KV_HEADS):
        mean = sum(weights[kv_head * GROUP : (kv_head + 1) * GROUP]) / GROUP
        assert (score[kv_head, :4] > score.max(initial=0, where=np.arange(60) >= 4)).all()
        for token in range(4, 60):
            value = np.linalg.norm(layer.values[kv_head, token].astype(np.float64))
            assert score[kv_head, token] == pytest.approx((mean[token] + epsilon) * value, rel=2e-3)


def test_expected_attention_without_the_bias_of_the_queries(rng, rope):
    """The bias moves the mean and nothing else; what is left is the published form."""
    layer = view(rng, rope, 60, 60)
    bias = rng.normal(size=(KV_HEADS * GROUP, DIM)).astype(np.float32)
    unrotated = layer.queries
    layer.queries = rope.rotate(unrotated, np.arange(60))
    plain = ExpectedAttention(horizon=9).score(layer)
    layer.queries, layer.query_bias = rope.rotate(unrotated + bias[:, None], np.arange(60)), bias
    np.testing.assert_allclose(ExpectedAttention(horizon=9, with_bias=False).score(layer), plain, rtol=1e-3)
    assert np.abs(ExpectedAttention(horizon=9).score(layer) / plain - 1).max() > 0.1


def test_expected_attention_knows_positions_after_an_eviction(rng, rope):
    """The latest rows are at 60 to 99 in every head; queries are turned back from there and on to 100."""
    layer = view(rng, rope, 60, 25)
    unrotated = layer.queries
    layer.positions = np.stack([[*rng.permutation(60)[:20], *range(60, 100)] for _ in range(KV_HEADS)])
    layer.positions[:, :20].sort()
    layer.queries = rope.rotate(unrotated, np.arange(75, 100))
    score = ExpectedAttention(horizon=9, epsilon=0.0).score(layer)
    layer.positions = np.arange(40, 100)  # as the reference reads them: the last one alone
    weights = expected_weights(layer, unrotated, future=9).reshape(KV_HEADS, GROUP, 60).mean(axis=1)
    np.testing.assert_allclose(score, weights * np.linalg.norm(layer.values, axis=-1), rtol=2e-3)


def test_the_expected_weight_is_that_of_gaussian_queries_at_the_next_position(rng, rope):
    """Formula against sample: the mean of exp(q k) over the very queries, turned to the next position."""
    tokens = 2500
    layer = view(rng, rope, tokens, tokens)
    layer.keys = layer.keys / 2
    layer.values = np.ones_like(layer.values) / DIM**0.5
    at_next = rope.rotate(layer.queries[:, 4:] / 2, np.full(tokens - 4, tokens))
    layer.queries = rope.rotate(layer.queries / 2, np.arange(tokens))
    score = ExpectedAttention(horizon=1, epsilon=0.0).score(layer)
    chosen = np.arange(50, tokens, 50)
    for kv_head in range(KV_HEADS):
        expected = np.zeros(len(chosen))
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            moments = np.exp(SCALING * at_next[head] @ layer.keys[kv_head].T).mean(axis=0)
            expected += moments[chosen] / moments[4:].sum() / GROUP
        np.testing.assert_allclose(score[kv_head, chosen], expected, rtol=0.05)


def test_expected_attention_foresees_queries_as_long_as_those_it_saw(rng, rope):
    """Whatever factor the model multiplies into its rotation: cached queries have it, and those to come do."""
    layer = view(rng, rope, 60, 40)
    plain = ExpectedAttention(horizon=9).score(layer)
    layer.rope = Rope(rope.inv_freq, attention_scaling=1.7)
    np.testing.assert_allclose(ExpectedAttention(horizon=9).score(layer), plain, rtol=1e-3)


ATTENTIVE = [SnapKV(window=8, kernel=1), Tova(), H2O(), ObservedAttention(), ExpectedAttention(sinks=0)]


@pytest.mark.parametrize("scorer", ATTENTIVE, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("token", [0, 17, 51])
def test_a_token_that_every_query_looks_at_is_found(scorer, token, rng):
    layer = view(rng, Rope(np.zeros(DIM // 2)), 60, 60)  # without rotation all positions are alike
    wanted = rng.normal(size=DIM).astype(np.float32)
    layer.queries = 0.1 * layer.queries + wanted
    layer.keys[:, token] = 2 * wanted
    layer.values[:, token] /= np.linalg.norm(layer.values[:, token], axis=-1, keepdims=True)
    layer.queries = layer.queries[:, -{SnapKV: 8, Tova: 1}.get(type(scorer), 60) :]
    score = scorer.score(layer)
    assert score[:, :52].argmax(axis=1).tolist() == [token] * KV_HEADS


@pytest.mark.parametrize("scorer", ATTENTIVE, ids=lambda s: type(s).__name__)
def test_a_query_head_speaks_for_its_own_kv_head_and_with_tova_for_all(scorer, rng):
    """Query head 3 wants token 20, which only KV head 1 may answer; the others are indifferent."""
    layer = view(rng, Rope(np.zeros(DIM // 2)), 60, 60)
    layer.queries = np.zeros_like(layer.queries)
    layer.queries[3] = wanted = rng.normal(size=DIM)
    layer.keys[:, 20] = 3 * wanted
    layer.values = np.ones_like(layer.values)
    layer.queries = layer.queries[:, -{SnapKV: 8, Tova: 1}.get(type(scorer), 60) :]
    score = scorer.score(layer)
    assert score[1, :52].argmax() == 20
    if isinstance(scorer, Tova):
        assert score[0].argmax() == 20
    else:
        assert score[0, 20] == pytest.approx(score[0, 19], rel=0.1)  # H2O gives older tokens a little more


def test_snapkv_spreads_a_vote_over_its_neighbours(rng):
    layer = view(rng, Rope(np.zeros(DIM // 2)), 60, 8)
    wanted = rng.normal(size=DIM)
    layer.queries[:] = wanted
    layer.keys[:, 20] = 5 * wanted
    score = SnapKV(window=8, kernel=5).score(layer)
    assert sorted(np.argsort(-score[0, :52])[:5].tolist()) == [18, 19, 20, 21, 22]


def test_the_queries_of_the_window_do_not_see_what_follows_them(rng):
    """A key that all want, placed last: only the last query can see it, the others vote as if it was not there."""
    layer = view(rng, Rope(np.zeros(DIM // 2)), 60, 60)
    layer.queries[:] = wanted = rng.normal(size=DIM)
    without = H2O().score(layer)
    layer.keys[:, 59] = 5 * wanted
    changed = H2O().score(layer) - without
    assert (changed[:, 59] > 0).all() and (changed[:, 59] < 1).all()
    assert (np.abs(changed[:, :59]).sum(axis=1) < 1).all()


@pytest.mark.parametrize("scorer", [Knorm(), KeyDiff()], ids=["knorm", "keydiff"])
def test_shuffled_tokens_have_shuffled_scores(scorer, rng, rope):
    layer = view(rng, rope, 50, 1)
    order = rng.permutation(50)
    shuffled = LayerView(layer.keys[:, order], layer.values, rope, layer.positions, layer.evictable, scaling=1)
    np.testing.assert_allclose(scorer.score(shuffled), scorer.score(layer)[:, order], atol=1e-6)


def test_knorm_prefers_short_keys_and_keydiff_looks_at_directions_only(rng, rope):
    layer = view(rng, rope, 50, 1)
    before = KeyDiff().score(layer)
    layer.keys[0, 12] *= 0.01
    assert (
        Knorm()
        .score(LayerView(layer.keys, layer.values, rope, layer.positions, layer.evictable, scaling=1))[0]
        .argmax()
        == 12
    )
    layer.keys[:] *= rng.uniform(0.5, 2.0, size=(KV_HEADS, 50, 1)).astype(np.float32)
    scaled = LayerView(layer.keys, layer.values, rope, layer.positions, layer.evictable, scaling=1)
    np.testing.assert_allclose(KeyDiff().score(scaled), before, atol=1e-5)


def test_keydiff_finds_the_key_that_points_away(rng, rope):
    layer = view(rng, rope, 50, 1)
    layer.keys[:] = np.array([3.0, *[0.0] * 15]) + 0.2 * layer.keys
    layer.keys[1, 33] *= -1
    assert KeyDiff().score(layer)[1].argmax() == 33
    layer.keys[0, 5] = 0.0  # no direction: neither like the others nor unlike them
    assert (
        KeyDiff().score(LayerView(layer.keys, layer.values, rope, layer.positions, slice(0, 50), scaling=1))[0, 5]
        == 0.0
    )


@pytest.mark.parametrize(
    "scorer, wrong",
    [
        (SnapKV, {"window": 0}),
        (SnapKV, {"kernel": 4}),
        (SnapKV, {"kernel": 0}),
        (H2O, {"window": 0}),
        (H2O, {"recent_share": 1.0}),
        (ObservedAttention, {"window": 0}),
        (ExpectedAttention, {"horizon": 0}),
        (ExpectedAttention, {"sinks": -1}),
        (ExpectedAttention, {"epsilon": -0.1}),
    ],
    ids=str,
)
def test_refuses_parameters_in_a_sentence(scorer, wrong):
    (key, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"(?<!\.){key}={value} .*(must|not)"):
        scorer(**wrong)


def test_scorers_say_what_they_read():
    reads = {type(s).__name__: s.reads for s in (Knorm(), KeyDiff(), *ATTENTIVE)}
    assert reads.pop("Knorm") == reads.pop("KeyDiff") == ("keys",)
    assert reads.pop("ExpectedAttention") == ("keys", "values", "queries")
    assert set(reads.values()) == {("keys", "queries")}
    assert (SnapKV().window, Tova().window, H2O().window, ExpectedAttention().window) == (64, 1, None, None)


def test_snapkv_and_tova_look_at_no_more_queries_than_they_want(rng, rope):
    layer = view(rng, rope, 60, 60)
    for scorer, window in ((SnapKV(window=7), 7), (Tova(), 1), (H2O(window=9), 9)):
        expected = scorer.score(layer)
        layer_of_few = LayerView(
            layer.keys, layer.values, rope, layer.positions, layer.evictable, scaling=SCALING,
            queries=layer.queries[:, -window:],
        )  # fmt: skip
        np.testing.assert_array_equal(scorer.score(layer_of_few), expected)


@pytest.mark.parametrize("tokens", [4, 7, 8, 9, 10])
def test_snapkv_scores_every_token_of_a_prompt_hardly_longer_than_its_window(tokens, rng, rope):
    layer = view(rng, rope, tokens, tokens)
    score = SnapKV(window=8, kernel=5).score(layer)
    assert score.shape == (KV_HEADS, tokens) and (score[:, -8:] == 1).all() and (score[:, :-8] < 1).all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_expected_attention_says_when_sinks_are_all_there_is(tokens, rng, rope):
    with pytest.raises(ValueError, match=rf"^sinks=4 leaves no query of {tokens} tokens: lower it"):
        ExpectedAttention().score(view(rng, rope, tokens, tokens))
    assert np.isfinite(ExpectedAttention().score(view(rng, rope, 5, 5))).all()


@pytest.mark.parametrize("scorer", ATTENTIVE, ids=lambda s: type(s).__name__)
def test_scorers_that_miss_their_queries_say_so(scorer, rng, rope):
    layer = view(rng, rope, 60, 60)
    layer.queries = None
    with pytest.raises(ValueError, match="reads queries and was given none: pass `queries`"):
        scorer.score(layer)


def test_a_view_says_that_nothing_may_be_evicted_and_wants_the_scaling(rng, rope):
    layer = view(rng, rope, 10, 1)
    with pytest.raises(ValueError, match=r"none of 10 tokens may be evicted \(evictable is 4 to 4\): keep them all"):
        LayerView(layer.keys, layer.values, rope, layer.positions, slice(4, 4), scaling=SCALING)
    with pytest.raises(TypeError, match="scaling"):
        LayerView(layer.keys, layer.values, rope, layer.positions, slice(0, 4))
