import numpy as np
import pytest
import torch

from spectral_kv.selection import Budget, select


def brute_force(scores: np.ndarray, budget: Budget) -> np.ndarray:
    tokens = scores.shape[1]
    kept = []
    for row in scores:
        protected = [*range(budget.sinks), *range(tokens - budget.recent, tokens)]
        rest = sorted(set(range(tokens)) - set(protected), key=lambda i: (-row[i], i))
        kept.append(sorted(protected + rest[: budget.tokens - len(protected)]))
    return np.array(kept)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("tokens, sinks, recent", [(20, 4, 8), (13, 0, 0), (90, 0, 64), (25, 20, 0)])
def test_keeps_the_protected_and_the_best_of_the_rest(make, tokens, sinks, recent, rng):
    scores = rng.integers(0, 10, size=(3, 100)).astype(np.float32)  # many ties: they go to the lowest index
    budget = Budget(tokens, sinks, recent)
    kept = np.asarray(select(make(scores), budget))
    np.testing.assert_array_equal(kept, brute_force(scores, budget))


@pytest.mark.parametrize("tokens", [100, 4096])
def test_a_budget_that_holds_everything_keeps_everything(tokens, rng):
    kept = select(rng.normal(size=(2, 100)), Budget(tokens))
    np.testing.assert_array_equal(kept, np.tile(np.arange(100), (2, 1)))


def test_ties_of_16_bit_scores_are_broken_as_in_float32():
    scores = torch.ones((1, 300), dtype=torch.bfloat16)
    assert select(scores, Budget(20, 2, 4))[0].tolist() == [*range(16), *range(296, 300)]


def test_scores_of_protected_tokens_do_not_count():
    scores = np.zeros((1, 50), dtype=np.float32)
    scores[0, :4], scores[0, -8:], scores[0, 20] = np.inf, np.nan, 1.0
    assert select(scores, Budget(13, 4, 8))[0].tolist() == [0, 1, 2, 3, 20, *range(42, 50)]


def test_refuses_nan_scores():
    with pytest.raises(ValueError, match="NaN"):
        select(np.full((1, 100), np.nan, dtype=np.float32), Budget(70))


@pytest.mark.parametrize("tokens", [0, 68])
def test_refuses_a_budget_that_sinks_and_recent_window_fill(tokens):
    with pytest.raises(ValueError, match="nothing to choose"):
        Budget(tokens, sinks=4, recent=64)
