import numpy as np
import pytest
import torch

from spectral_kv.selection import Budget, select, select_layers


def mlx_array(x):
    return pytest.importorskip("mlx.core").array(x)


ARRAYS = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])


def brute_force(scores: np.ndarray, budget: Budget) -> np.ndarray:
    tokens = scores.shape[1]
    kept = []
    for row in scores:
        protected = [*range(budget.sinks), *range(tokens - budget.recent, tokens)]
        rest = sorted(set(range(tokens)) - set(protected), key=lambda i: (-row[i], i))
        kept.append(sorted(protected + rest[: budget.tokens - len(protected)]))
    return np.array(kept)


@ARRAYS
@pytest.mark.parametrize("tokens, sinks, recent", [(20, 4, 8), (13, 0, 0), (90, 0, 64), (25, 20, 0)])
def test_keeps_the_protected_and_the_best_of_the_rest(make, tokens, sinks, recent, rng):
    scores = rng.integers(0, 10, size=(3, 100)).astype(np.float32)  # many ties: they go to the lowest index
    budget = Budget(tokens, sinks, recent)
    kept = np.asarray(select(make(scores), budget))
    np.testing.assert_array_equal(kept, brute_force(scores, budget))
    assert kept.shape == (3, tokens)
    assert (np.diff(kept, axis=1) > 0).all()  # ascending, none twice
    for row in kept.tolist():
        assert {*range(sinks), *range(100 - recent, 100)} <= set(row)


@ARRAYS
@pytest.mark.parametrize("tokens", [100, 4096])
def test_a_budget_that_holds_everything_keeps_everything(make, tokens, rng):
    kept = select(make(rng.normal(size=(2, 100)).astype(np.float32)), Budget(tokens))
    np.testing.assert_array_equal(np.asarray(kept), np.tile(np.arange(100), (2, 1)))


@ARRAYS
def test_a_budget_one_short_drops_the_lowest_score(make, rng):
    scores = rng.normal(size=(2, 100)).astype(np.float32)
    scores[0, 40], scores[1, 7] = -9.0, -9.0
    kept = np.asarray(select(make(scores), Budget(99, 2, 8)))
    assert [set(range(100)) - set(row) for row in kept.tolist()] == [{40}, {7}]


@ARRAYS
def test_equal_scores_go_to_the_lowest_index(make):
    scores = make(np.full((2, 300), 0.25, dtype=np.float32))
    assert np.asarray(select(scores, Budget(20, 2, 4))).tolist() == [[*range(16), *range(296, 300)]] * 2


def test_ties_of_16_bit_scores_are_broken_as_in_float32():
    scores = torch.ones((1, 300), dtype=torch.bfloat16)
    assert select(scores, Budget(20, 2, 4))[0].tolist() == [*range(16), *range(296, 300)]


def test_scores_of_protected_tokens_do_not_count():
    scores = np.zeros((1, 50), dtype=np.float32)
    scores[0, :4], scores[0, -8:], scores[0, 20] = np.inf, np.nan, 1.0
    assert select(scores, Budget(13, 4, 8))[0].tolist() == [0, 1, 2, 3, 20, *range(42, 50)]


@ARRAYS
def test_per_head_keeps_the_same_tokens_in_every_layer_by_the_mean_of_the_scores(make, rng):
    scores = rng.normal(size=(3, 2, 100)).astype(np.float32)
    budget = Budget(30, 4, 8, "per_head")
    kept = [np.asarray(x) for x in select_layers([make(s) for s in scores], budget)]
    expected = brute_force(scores.astype(np.float64).mean(axis=0), budget)
    assert len(kept) == 3
    for layer in kept:
        np.testing.assert_array_equal(layer, expected)
    assert (expected[0] != expected[1]).any()  # the KV heads of a layer still differ


@ARRAYS
def test_per_head_is_swayed_by_one_layer_as_much_as_its_mean_is(make):
    """A maximum over the layers would keep token 20, the mean keeps 30: what all layers find good."""
    scores = np.zeros((3, 1, 50), dtype=np.float32)
    scores[0, 0, 20], scores[1:, 0, 20], scores[:, 0, 30] = 2.0, -1.0, 1.0
    kept = select_layers([make(s) for s in scores], Budget(13, 4, 8, "per_head"))
    assert np.asarray(kept[0])[0, 4] == 30


def test_per_layer_perhead_lets_every_layer_choose(rng):
    scores = rng.normal(size=(3, 2, 100)).astype(np.float32)
    budget = Budget(30, 4, 8)
    kept = select_layers(list(scores), budget)
    for layer, chosen in enumerate(kept):
        np.testing.assert_array_equal(chosen, brute_force(scores[layer], budget))
    assert (kept[0] != kept[1]).any()


def test_refuses_nan_scores():
    with pytest.raises(ValueError, match="NaN"):
        select(np.full((1, 100), np.nan, dtype=np.float32), Budget(70))


@pytest.mark.parametrize("tokens", [0, 68])
def test_refuses_a_budget_that_sinks_and_recent_window_fill(tokens):
    with pytest.raises(ValueError, match="nothing to choose"):
        Budget(tokens, sinks=4, recent=64)


def test_refuses_selections_and_windows_that_do_not_exist():
    with pytest.raises(ValueError, match="per_layer_perhead, per_head"):
        Budget(100, selection="global")
    with pytest.raises(ValueError, match="negative"):
        Budget(100, sinks=-1)


def test_a_share_of_what_sinks_leave_goes_to_the_most_recent():
    half = Budget(512, sinks=4, recent=64).with_recent_share(0.5)
    assert (half.tokens, half.sinks, half.recent) == (512, 4, 254)
    assert Budget(100, sinks=0, recent=64).with_recent_share(0.0).recent == 0
    assert Budget(6, sinks=4, recent=1).with_recent_share(0.99).recent == 1
