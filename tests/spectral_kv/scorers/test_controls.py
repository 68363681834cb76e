import numpy as np
import torch

from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.random import Random
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.selection import Budget, select


def view(rope, seed=(0, 0)) -> LayerView:
    return LayerView(
        torch.zeros(2, 100, 16), torch.zeros(2, 100, 16), rope, np.arange(100), slice(4, 90), scaling=1, seed=seed
    )


def test_streaming_keeps_sinks_and_the_last_tokens(rope):
    kept = select(Streaming().score(view(rope)), Budget(30, sinks=4, recent=10))
    assert kept.tolist() == [[*range(4), *range(74, 100)]] * 2


def test_random_differs_between_seeds_documents_layers_and_heads_and_is_reproducible(rope):
    first = Random(seed=1).score(view(rope, (0, 0)))
    torch.testing.assert_close(Random(seed=1).score(view(rope, (0, 0))), first)
    for other in (
        Random(seed=2).score(view(rope, (0, 0))),
        Random(seed=1).score(view(rope, (1, 0))),
        Random(seed=1).score(view(rope, (0, 1))),
    ):
        assert not torch.equal(other, first)
    assert not torch.equal(first[0], first[1])
    assert 0.35 < first.mean() < 0.65
