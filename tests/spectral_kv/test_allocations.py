"""Budgets that layers and KV heads share out by their scores."""

import numpy as np
import pytest
import torch

from spectral_kv.heads import held
from spectral_kv.selection import Budget, select_layers


def mlx_array(x):
    return pytest.importorskip("mlx.core").array(x)


ARRAYS = pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, mlx_array], ids=["numpy", "torch", "mlx"])
LAYERS, HEADS, TOKENS = 3, 2, 100


def budget(allocation: str, safeguard: float = 0.2, tokens: int = 30) -> Budget:
    return Budget(tokens, 4, 8, allocation=allocation, safeguard=safeguard)


def scores(rng) -> np.ndarray:
    """Heads of all scales, with ties."""
    found = rng.integers(0, 50, size=(LAYERS, HEADS, TOKENS)) * rng.random((LAYERS, HEADS, 1))
    return found.astype(np.float32)


def numbers(kept) -> list[list[int]]:
    return [[len(head) for head in layer] for layer in kept]


def plain(kept) -> list[list[list[int]]]:
    return [[np.asarray(head).tolist() for head in layer] for layer in kept]


def brute_force(x: np.ndarray, of: Budget) -> list[list[list[int]]]:
    """The definition: sort (score, place) and take from the top."""
    middle, each = range(4, TOKENS - 8), of.tokens - 12
    chosen = {(layer, head): set() for layer in range(LAYERS) for head in range(HEADS)}
    order = sorted((-x[la, h, t], la, h, t) for la in range(LAYERS) for h in range(HEADS) for t in middle)
    if of.allocation == "global":
        for _, layer, head, token in order[: each * LAYERS * HEADS]:
            chosen[layer, head].add(token)
    if of.allocation == "head":
        for layer in range(LAYERS):
            own = [o for o in order if o[1] == layer]
            for head in range(HEADS):
                for _, _, _, token in [o for o in own if o[2] == head][: int(of.safeguard * each)]:
                    chosen[layer, head].add(token)
            for _, _, head, token in own:
                if sum(len(chosen[layer, h]) for h in range(HEADS)) < each * HEADS:
                    chosen[layer, head].add(token)
    if of.allocation == "layer":
        curves = [np.mean([sorted(x[la, h, 4:-8], reverse=True) for h in range(HEADS)], axis=0) for la in range(LAYERS)]
        best = sorted((-c, la, r) for la, curve in enumerate(curves) for r, c in enumerate(curve))
        for layer in range(LAYERS):
            count = sum(1 for _, la, _ in best[: each * LAYERS] if la == layer)
            for head in range(HEADS):
                chosen[layer, head] = {t for _, _, _, t in [o for o in order if o[1:3] == (layer, head)][:count]}
    ends = {*range(4), *range(TOKENS - 8, TOKENS)}
    return [[sorted(chosen[layer, head] | ends) for head in range(HEADS)] for layer in range(LAYERS)]


@ARRAYS
@pytest.mark.parametrize("allocation", ["layer", "head", "global"])
def test_allocations_equal_their_definitions_and_hold_the_budget(allocation, make, rng):
    x, of = scores(rng), budget(allocation)
    kept = select_layers([make(layer) for layer in x], of)
    assert plain(kept) == brute_force(x, of)
    assert sum(map(held, kept)) == LAYERS * HEADS * of.tokens
    assert len({n for layer in numbers(kept) for n in layer}) > 1


def test_a_layer_allocation_is_uniform_over_the_heads_of_a_layer(rng):
    kept = select_layers(list(scores(rng)), budget("layer"))
    assert all(isinstance(layer, np.ndarray) and layer.ndim == 2 for layer in kept)


def test_a_full_safeguard_is_uniform(rng):
    x = list(scores(rng))
    kept, uniform = select_layers(x, budget("head", 1.0)), select_layers(x, budget("uniform"))
    assert plain(kept) == plain(uniform)


def test_a_head_that_attends_to_nothing_gives_its_budget_away():
    x = np.ones((LAYERS, HEADS, TOKENS), np.float32)
    x[0, 0] = 0
    assert numbers(select_layers(list(x), budget("head", 0.0)))[0] == [12, 48]
    assert numbers(select_layers(list(x), budget("head", 0.5)))[0] == [12 + 9, 48 - 9]
    given = numbers(select_layers(list(x), budget("global")))
    assert given[0][0] == 12 and sum(map(sum, given)) == LAYERS * HEADS * 30
    x[0] = 0
    assert numbers(select_layers(list(x), budget("layer")))[0] == [12, 12]


def test_the_safeguard_holds_whatever_the_scores(rng):
    x = scores(rng)
    x[:, 1] += 1000
    for layer in numbers(select_layers(list(x), budget("head", 0.25))):
        assert layer[0] == 12 + int(0.25 * 18)


def test_heads_of_different_lengths_share_out_again(rng):
    first = select_layers(list(scores(rng)), budget("head", tokens=40))
    again = [[rng.random(len(head)).astype(np.float32) for head in layer] for layer in first]
    kept = select_layers(again, budget("head"))
    assert sum(map(held, kept)) == LAYERS * HEADS * 30
    for layer, before in zip(kept, first, strict=True):
        for head, old in zip(layer, before, strict=True):
            assert {0, 1, 2, 3, *range(len(old) - 8, len(old))} <= set(head.tolist())


def test_what_can_not_be_is_refused(rng):
    x = scores(rng)
    x[1, 1, 50] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        select_layers(list(x), budget("global"))
    with pytest.raises(ValueError, match="allocation=some"):
        budget("some")
    with pytest.raises(ValueError, match="safeguard="):
        budget("head", 1.5)
    with pytest.raises(ValueError, match="sinks=0 and recent=0 protect no token"):
        Budget(20, 0, 0, allocation="head")
    with pytest.raises(ValueError, match="selection=per_head"):
        Budget(100, selection="per_head", allocation="head")
