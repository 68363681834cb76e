"""Scores of all layers of a model: of many at once where a device is faster than the host that feeds it."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_kv.backends.base import Prefill
from spectral_kv.scorers.base import LayerView, Scorer, recency
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.keydiff import KeyDiff
from spectral_kv.scorers.knorm import Knorm
from spectral_kv.scorers.snapkv import SnapKV
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.streaming import Streaming
from spectral_kv.scorers.tri import TriAttention
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri
from spectral_kv.xp import Array, namespace, on_accelerator

if TYPE_CHECKING:
    from spectral_kv.engine.captured import Pass

# To these every KV head is on its own, whatever layer it belongs to (TOVA averages over those of a layer).
HEADWISE = (Spectral, Knorm, KeyDiff, SnapKV, Streaming, ExpectedAttention, TriAttention)
SHARE = 0.3  # of the free memory of a device that scores may take for a while
UNITS = 16  # bytes that a scorer may take for a byte of keys


def scores(scorer: Scorer, views: list[LayerView]) -> list[Array]:
    """Scores `[kv_heads, tokens]` of every layer."""
    if not _worth_it(views[0].keys) or not _alike(scorer, views):
        return [scorer.score(view) for view in views]
    group, result = _group(views[0].keys, len(views)), []
    for start in range(0, len(views), group):
        some = views[start : start + group]
        heads = some[0].keys.shape[0]
        joined = scorer.score(_stacked(some))
        result += [joined[heads * i : heads * (i + 1)] for i in range(len(some))]
    return result


def in_one_pass(scorer: Scorer, first: LayerView, cached: Any, queries: list[Array] | None) -> Array | None:
    """Scores `[layers, kv_heads, tokens]` from the keys of all layers where they lie: by kernels, or products of a CPU.

    None where a device has neither for the scorer.

    Parameters
    ----------
    first : LayerView
        Of the first layer.
    cached : Prefill or Contents
        Of all layers.
    queries : list of array, optional
        As of `Compressor.scores`.
    """
    keys, tokens = cached.keys, first.tokens
    passes = PASSES if _on_gpu(first.keys) else CPU_PASSES if _on_cpu(first.keys) else {}
    if type(scorer) not in passes:
        return None
    if passes is PASSES:
        from spectral_kv.engine.scoring import suits
    else:
        from spectral_kv.engine.products import suits

    if not isinstance(cached, Prefill):  # whose tokens follow one another from 0 on
        whole = np.arange(tokens)
        if not all(np.array_equal(positions, whole) for positions in cached.positions):
            return None
    if first.gathered is not None or not suits(keys):
        return None
    found = passes[type(scorer)](scorer, first, keys, cached.values, queries)
    return None if found is None else found.reshape(len(keys), *first.keys.shape[:2])


def _on_gpu(x: Array) -> bool:
    """Whether kernels can read an array."""
    return getattr(x, "is_cuda", False) and find_spec("triton") is not None


def _on_cpu(x: Array) -> bool:
    """Whether torch computes on an array on a CPU."""
    return hasattr(x, "detach") and x.device.type == "cpu"


def _in_groups(keys: list[Array], copies: float, found: Callable[[slice], tuple[Array, ...]]) -> tuple[Array, ...]:
    """What is `found` of groups of layers whose temporaries, `copies` float32 keys each, free memory can hold."""
    group = _group(keys[0], len(keys), copies * 4 / keys[0].dtype.itemsize)
    if group == len(keys):
        return found(slice(0, group))
    import torch

    parts = [found(slice(start, start + group)) for start in range(0, len(keys), group)]
    return tuple(torch.cat(alike) for alike in zip(*parts, strict=True))


def pass_over_keys(scorer: Scorer, first: LayerView, keys: list[Array]) -> "Pass | None":
    """Scores of keys of all layers on a GPU as a pass that a captured graph can hold, or None.

    `first` is of the first layer; positions of all of them follow one another from 0 on.
    """
    return _spectral_pass(scorer, first, keys) if _on_gpu(first.keys) and type(scorer) in (Wavelet, Fourier) else None


def _spectral_pass(scorer: Spectral, first: LayerView, keys: list) -> "Pass | None":
    """Where the transform is a band of short filters."""
    from spectral_kv.engine import scoring
    from spectral_kv.engine.banded import plan
    from spectral_kv.engine.captured import Pass

    chosen = plan(scorer, first.tokens)
    if chosen is None:
        return None

    def scored(where: Array) -> Array:
        return _blended(scorer, first, *scoring.deviations(chosen, keys, first.rope, where))

    def constants() -> list:
        return [*scoring.constants(chosen, first.rope, first.tokens, keys[0].device), recency(first)]

    rope = (first.rope.inv_freq.tobytes(), first.rope.attention_scaling)
    key = (type(scorer), scorer, rope, first.evictable.start, first.evictable.stop)
    return Pass(key, scored, constants)


def _spectral(scorer: Spectral, first: LayerView, keys: list, *others: Any) -> Array | None:
    from spectral_kv.engine import captured, scoring

    found = _spectral_pass(scorer, first, keys)
    if found is None:
        return None
    return captured.scores(found, keys) if keys[0].is_cuda else found.scored(scoring.addresses(keys))


def _by_products(scorer: Spectral, first: LayerView, keys: list, *others: Any) -> Array | None:
    """`_spectral` on a CPU."""
    from spectral_kv.engine import products

    made = products.products(scorer, first.tokens)
    if made is None:
        return None
    return scorer.blend(*products.deviations(scorer, made, keys, first.rope), first)


def _cascade(scorer: WaveletFourier, first: LayerView, keys: list, *others: Any) -> Array | None:
    from spectral_kv.engine import cascade

    found = cascade.plans(scorer, first.tokens)
    if found is None:
        return None

    def of_group(some: slice) -> tuple[Array, Array]:
        return cascade.deviations(scorer, found, keys[some], first.rope)

    return _blended(scorer, first, *_in_groups(keys, cascade.COPIES, of_group))


def _blended(scorer: Spectral, first: LayerView, deviation: Array, norms: Array) -> Array:
    from spectral_kv.engine.scoring import blended

    weights = (scorer.spectral_weight, scorer.recency_weight, scorer.norm_weight)
    sign = -1 if scorer.sign == "smoothness" else 1
    return blended(deviation, norms, recency(first), first.evictable, weights, sign)


def _with_tri(scorer: WaveletTri, first: LayerView, keys: list, *others: Any) -> Array | None:
    import torch

    wavelet = (_spectral if _on_gpu(first.keys) else _by_products)(scorer, first, keys)
    if wavelet is None:
        return None
    views = [replace(first, keys=k, index=first.index + i) for i, k in enumerate(keys)]
    return scorer.weighed(wavelet, torch.cat(scores(scorer.tri, views)), first.evictable)


def _expected(scorer: ExpectedAttention, first: LayerView, keys: list, values: list, queries: list) -> Array | None:
    from spectral_kv.engine import expected
    from spectral_kv.engine.scoring import suits

    if queries is None or not scorer.with_bias or not suits(values) or not expected.suits(queries):
        return None
    return expected.scores(scorer, first, keys, values, queries)


PASSES = {
    Wavelet: _spectral, Fourier: _spectral, WaveletFourier: _cascade, WaveletTri: _with_tri,
    ExpectedAttention: _expected,
}  # fmt: skip
CPU_PASSES = {Wavelet: _by_products, Fourier: _by_products, WaveletTri: _with_tri}


def _worth_it(x: Array) -> bool:
    """Whether an array lies on a device that is fed by the host; a CPU's caches like one layer better than many."""
    return on_accelerator(x)


def _alike(scorer: Scorer, views: list[LayerView]) -> bool:
    """Whether layers can be stacked: of one shape, at the same positions, scored head by head."""
    if not isinstance(scorer, HEADWISE) or getattr(scorer, "shuffle_seed", None) is not None:
        return False
    first = views[0]
    return all(
        v.keys.shape == first.keys.shape
        and v.evictable == first.evictable
        and v.positions.ndim == 1
        and (v.positions is first.positions or np.array_equal(v.positions, first.positions))
        and v.gathered is None
        and v.statistics is first.statistics
        for v in views
    )


def _stacked(views: list[LayerView]) -> LayerView:
    """Layers as one with all their heads."""
    xp = namespace(views[0].keys)

    def joined(name: str) -> Array | None:
        parts = [getattr(v, name) for v in views]
        return None if parts[0] is None else xp.concat(parts, axis=0)

    return replace(
        views[0],
        **{name: joined(name) for name in ("keys", "values", "queries", "future", "query_bias")},
        statistics=views[0].statistics and views[0].statistics.joined([v.index for v in views]),
        index=0,
    )


def _group(x: Array, layers: int, units: float = UNITS) -> int:
    """How many of the layers of keys like `x` fit into free memory together."""
    if not getattr(x, "is_cuda", False):
        return layers
    import torch

    free, _ = torch.cuda.mem_get_info(x.device)
    free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    return max(1, min(layers, int(SHARE * free / (units * x.nbytes))))
