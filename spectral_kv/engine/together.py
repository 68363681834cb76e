"""Scores of all layers of a model: of many at once where a device is faster than the host that feeds it."""

from dataclasses import replace

import numpy as np

from spectral_kv.scorers.base import LayerView, Scorer
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.xp import Array, namespace, on_accelerator

# To these every KV head is on its own, whatever layer it belongs to (TOVA averages over those of a layer).
HEADWISE = (Spectral, Knorm, KeyDiff, SnapKV, Streaming, ExpectedAttention)
SHARE = 0.3  # of the free memory of a device that scores may take for a while
UNITS = 16  # bytes that a scorer may take for a byte of keys


def scores(scorer: Scorer, views: list[LayerView]) -> list[Array]:
    """Scores `[kv_heads, tokens]` of every layer."""
    if not _worth_it(views[0].keys) or not _alike(scorer, views):
        return [scorer.score(view) for view in views]
    if (found := _banded(scorer, views)) is not None:
        return found
    group, result = _group(views), []
    for start in range(0, len(views), group):
        some = views[start : start + group]
        heads = some[0].keys.shape[0]
        joined = scorer.score(_stacked(some))
        result += [joined[heads * i : heads * (i + 1)] for i in range(len(some))]
    return result


def _worth_it(x: Array) -> bool:
    """Whether an array lies on a device that is fed by the host; a CPU's caches like one layer better than many."""
    return on_accelerator(x)


def _alike(scorer: Scorer, views: list[LayerView]) -> bool:
    """Whether layers can be stacked: of one shape, at the same positions, scored head by head."""
    if not isinstance(scorer, HEADWISE) or getattr(scorer, "shuffle_seed", None) is not None:
        return False
    if "calibration" in scorer.reads:  # statistics are of one layer
        return False
    first = views[0]
    return all(
        v.keys.shape == first.keys.shape
        and v.evictable == first.evictable
        and v.positions.ndim == 1
        and (v.positions is first.positions or np.array_equal(v.positions, first.positions))
        and getattr(v, "gathered", None) is None
        for v in views
    )


def _stacked(views: list[LayerView]) -> LayerView:
    """Layers as one with all their heads."""
    xp = namespace(views[0].keys)

    def joined(name: str) -> Array | None:
        parts = [getattr(v, name) for v in views]
        return None if parts[0] is None else xp.concat(parts, axis=0)

    return replace(views[0], **{name: joined(name) for name in ("keys", "values", "queries", "future")})


def _group(views: list[LayerView]) -> int:
    """How many layers fit into free memory together."""
    x = views[0].keys
    if not hasattr(x, "is_cuda"):
        return len(views)
    import torch

    free, _ = torch.cuda.mem_get_info(x.device)
    free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return max(1, min(len(views), int(SHARE * free / (UNITS * x.nbytes))))


def _banded(scorer: Scorer, views: list[LayerView]) -> list[Array] | None:
    """By one pass over the keys, where a spectral scorer's transform is a band of filters."""
    first = views[0]
    if not isinstance(scorer, Spectral) or not hasattr(first.keys, "is_cuda"):
        return None
    from importlib.util import find_spec

    from spectral_kv.engine.banded import plan
    from spectral_kv.engine.scoring import deviations, suits

    keys = [v.keys for v in views]
    tokens = keys[0].shape[1]
    if find_spec("triton") is None or not suits(keys) or not np.array_equal(first.positions, np.arange(tokens)):
        return None
    if (chosen := plan(scorer, tokens)) is None:
        return None
    heads = keys[0].shape[0]
    blended = scorer.blend(*deviations(chosen, keys, first.rope), first)
    return [blended[heads * i : heads * (i + 1)] for i in range(len(views))]
