"""What an audit asks of every run: that compression ran, what it freed, and what no head has any more."""

import numpy as np

from pipeline.stages.compress import Compressed, remembered
from pipeline.stages.prefill import FullRun
from spectral_kv.compressor import Compressor
from spectral_kv.heads import held
from spectral_kv.xp import to_numpy


def audited(compressor: Compressor, full: FullRun, compressed: Compressed) -> dict[str, float]:
    """Metrics of one document.

    `audit/evicted_tokens` counts a token once for every layer and KV head that evicted it; `kept/gone_everywhere` is
    the share of the prompt's tokens that none of them holds; `audit/freed_mb` is what the cache takes less than the
    full one. `audit/prefill_mb` is what lives when the prompt has run, of its queries those that the method wants, and
    `audit/prefill_peak_mb`, where the device counts it, the most that was allocated until then: a cache may be small
    and its prefill not. Jobs share prefills; one that remembers more than the method wants has no peak of it.

    Raises
    ------
    RuntimeError
        If a method that had to evict did not, or freed nothing.
    """
    prefill, kept = full.prefill, compressed.kept
    tokens = len(prefill.tokens)
    everything = len(prefill.keys) * compressor.backend.shape.kv_heads * tokens
    bytes_of_all = sum(x.nbytes for x in (*prefill.keys, *prefill.values))
    evicted, gone = 0, 0.0
    if kept is not None:
        evicted = everything - sum(map(held, kept))
        there = np.zeros(tokens, dtype=bool)
        for layer in kept:
            for head in layer:
                there[to_numpy(head)] = True
        gone = 1 - there.mean()
    freed = bytes_of_all - compressed.cache.nbytes
    weighs = getattr(compressor.storage, "weighs", False)  # then scores say how fine tokens are coded
    if compressor.scorer is not None and not weighs and not compressor.keeps_all(prefill):
        due = everything * (tokens - compressor.budget.tokens) // tokens
        if evicted != due or freed <= 0:
            raise RuntimeError(
                f"the method had to evict {due} tokens over layers and KV heads and evicted {evicted}, which freed "
                f"{freed} bytes: the cache was not compressed"
            )
    wanted = remembered(compressor, tokens, full.chunk)
    too_many = sum(q.nbytes for q in prefill.queries) * (full.observed - wanted) // max(full.observed, 1)
    values = {
        "kept/gone_everywhere": gone,
        "audit/evicted_tokens": evicted,
        "audit/freed_mb": freed / 1e6,
        "audit/prefill_mb": (prefill.nbytes - too_many) / 1e6,
    }
    if full.peak is not None and full.observed == wanted:
        values["audit/prefill_peak_mb"] = full.peak / 1e6
    return {name: float(value) for name, value in values.items()}
