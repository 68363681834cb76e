"""ExpectedAttention of all layers at once on a GPU: queries and keys are read where they lie, in the cache's dtype."""

import torch
import triton

from spectral_kv.engine import expected_kernels as kernels
from spectral_kv.engine.scoring import addresses, dtype_of, waves
from spectral_kv.rope import Rope
from spectral_kv.scorers.base import LayerView
from spectral_kv.scorers.expected_attention import ExpectedAttention
from spectral_kv.xp import like

CHUNKS = 8  # programs that share the queries of a head


def suits(queries: list[torch.Tensor]) -> bool:
    """Whether the kernels can read queries `[query_heads, observed, dim]`, one a layer."""
    strides = queries[0].stride()
    return strides[-1] == 1 and all(q.stride() == strides and q.dtype == queries[0].dtype for q in queries)


def moments(queries: list[torch.Tensor], rope: Rope, tokens: int, sinks: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number, means and covariances of the queries of the last of `tokens` tokens before their rotation.

    Without those at positions below `sinks`; `[layers * query_heads, dim]` and `[layers * query_heads, dim, dim]`.
    """
    heads, observed, dim = queries[0].shape
    first, device = tokens - observed, queries[0].device
    left_out = min(max(sinks - first, 0), observed)
    count, rows = observed - left_out, len(queries) * heads
    if not count:
        raise ValueError(f"sinks={sinks} leaves no query of {tokens} tokens: lower it")
    cos, sin = waves(rope, tokens, device)
    where, chunk = addresses(queries), -(-count // CHUNKS)
    strides = (queries[0].stride(1), queries[0].stride(0))
    meta = {"D": dim, "BT": 64, "DTYPE": dtype_of(queries[0])}
    sums = torch.empty(rows, CHUNKS, dim, device=device)
    kernels.query_sums[(CHUNKS, rows)](where, cos, sin, sums, left_out, observed, first, *strides, heads, chunk, **meta)
    mean = sums.sum(1) / count
    scatter = torch.empty(rows, CHUNKS, dim, dim, device=device)
    kernels.query_scatter[(CHUNKS, rows)](
        where, cos, sin, mean, scatter, left_out, observed, first, *strides, heads, chunk, **meta,
        PRECISION="tf32x3", num_warps=8 if dim > 64 else 4, num_stages=2,
    )  # fmt: skip
    return count, mean, scatter.sum(1) / count


def scores(scorer: ExpectedAttention, first: LayerView, keys: list, values: list, queries: list) -> torch.Tensor:
    """`scorer.score` of all layers of a prompt, `[layers * kv_heads, tokens]`; `first` is the first one's view."""
    (kv_heads, tokens, dim), rows = keys[0].shape, len(keys) * keys[0].shape[0]
    if scorer.window is not None:
        queries = [q[:, max(q.shape[1] - scorer.window, 0) :] for q in queries]
    _, mean, covariance = moments(queries, first.rope, tokens, scorer.sinks)
    turn = like(scorer.mean_rotation(first), mean)
    group = queries[0].shape[0] // kv_heads
    mean, covariance = mean @ turn, turn.T @ covariance @ turn
    expected = torch.empty(rows, group, tokens, device=mean.device)
    norms = torch.empty(rows, tokens, device=mean.device)
    where = addresses([*keys, *values])
    tile = 64
    kernels.expected_logits[(triton.cdiv(tokens, tile), rows)](
        where, where[len(keys) :], mean.contiguous(), covariance.contiguous(), expected, norms, tokens, kv_heads,
        first.scaling, G=group, D=dim, BT=tile, DTYPE=dtype_of(keys[0]), PRECISION="tf32x3", num_warps=4,
        num_stages=2,
    )  # fmt: skip
    sinks = min(scorer.sinks, tokens)
    weights = expected[..., sinks:].softmax(-1).mean(1) + scorer.epsilon
    out = norms  # whose room the scores take
    out[:, sinks:].mul_(weights)
    out[:, :sinks] = out[:, sinks:].max() + 1
    return out
