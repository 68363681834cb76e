"""Decoding: a budget held while more and more tokens are fed, one by one."""

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.phases.base import Context, Row
from spectral_kv.attention import attention_output
from spectral_kv.backends.base import Contents, Extension
from spectral_kv.metrics.perturbation import attention_output_perturbation
from spectral_kv.metrics.prediction import kl_divergence, log_softmax, negative_log_likelihood, top1_agreement
from spectral_kv.xp import Array, like, namespace, to_numpy


def joined(parts: list[Array], axis: int) -> Array:
    """Arrays one after the other."""
    return namespace(parts[0]).concat(parts, axis=axis)


@dataclass(frozen=True)
class Decoding:
    """The true continuation, fed token by token as in generation, with `every` as in `spectral_kv.cache`.

    Whenever the cache is `every` tokens over its budget, all that it holds is scored again with the queries that such a
    cache remembers, and it is brought back to the budget. The stretches between are the steps of the curves
    `decoding/aop` (of a stretch's first tokens, over everything before it), `decoding/kl` and `decoding/delta_nll` (of
    all of its tokens), against the full cache; a step is the number of tokens fed by the end of the stretch.

    Memory is what is allocated at the fullest step, room to grow included. Speed is that of one forward pass a token,
    with the evictions between them; the full cache is timed on the same steps.

    Parameters
    ----------
    tokens : int
        Fed tokens.
    every : int, optional
        None: nothing is evicted after the prompt, and a stretch is 128 tokens.
    positions : int
        First tokens of every stretch whose queries are compared.
    documents : int
        How many documents are decoded.
    """

    tokens: int = 640
    every: int | None = 128
    positions: int = 16
    documents: int = 5

    predicts: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("tokens", "every", "positions", "documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"phase.decoding.{name}={value} must be at least 1")
        if self.positions > min(self.stretch, self.tokens):
            raise ValueError(
                f"phase.decoding.positions={self.positions} are more than the {min(self.stretch, self.tokens)} tokens "
                "of a stretch: lower them, or raise phase.decoding.every and phase.decoding.tokens"
            )

    @property
    def stretch(self) -> int:
        """Tokens between two evictions."""
        return self.every or 128

    @property
    def needs(self) -> int:
        return self.tokens

    @property
    def recompresses(self) -> bool:
        return self.every is not None

    def measure(self, context: Context) -> list[Row]:
        if context.document >= self.documents:
            return []
        backend, tokens = context.backend, context.continuation[: self.tokens]
        fed, whole = context.once(("decoding", self.tokens), lambda: self._on_the_full_cache(context))
        full_seconds = context.once(("decoding, timed", self.tokens), lambda: self._timed(context))
        full = log_softmax(fed.logits)
        prompt = len(context.prefill.tokens)
        held = prompt if context.kept is None else context.mean_kept
        cache, compressor = context.compressed_cache(), context.compressor
        remembered = compressor.remembered(self.every)
        queries = context.queries(compressor.remembered(self.every, evicted=held < prompt))
        limit = prompt + self.tokens  # tokens that are held at most
        if self.every and compressor.scorer is not None:
            limit = compressor.budget.tokens + self.every
        cache.reserve(min(math.ceil(limit - held), self.tokens))
        rows: list[Row] = []
        kl, rise, same = [], [], []
        seconds, peak, most_bytes, most_held, evictions = 0.0, 0, cache.allocated, held, 0
        for start in range(0, self.tokens, self.stretch):
            stop = min(start + self.stretch, self.tokens)
            aop = self._perturbation(context, fed, whole, backend.contents(cache), prompt, start)
            backend.peak_bytes()
            clock = time.perf_counter()
            steps: list[Extension] = []
            for at, token in enumerate(tokens[start:stop], start + 1):
                steps.append(backend.extend(cache, np.array([token])))
                backend.synchronize(steps[-1].logits)
                held += 1
                most_bytes, most_held = max(most_bytes, cache.allocated), max(most_held, held)
                if remembered:
                    queries = [joined(pair, 1) for pair in zip(queries, steps[-1].queries, strict=True)]
                    queries = [q[:, max(q.shape[1] - remembered, 0) :] for q in queries]
                if held >= limit and at < self.tokens:
                    future = [q[:, at:] for q in fed.queries]
                    cache = context.recompressed(cache, queries, future, step=(prompt + at,))
                    held, evictions = compressor.budget.tokens, evictions + 1
                    cache.reserve(min(math.ceil(limit - held), self.tokens - at))
                    kept = compressor.remembered(self.every, evicted=True)
                    queries = [q[:, max(q.shape[1] - kept, 0) :] for q in queries]
                    backend.synchronize()
            seconds += time.perf_counter() - clock
            peak = max(peak, backend.peak_bytes() or 0)
            ours, theirs = log_softmax(joined([s.logits for s in steps], 0)), full[start:stop]
            kl.append(to_numpy(kl_divergence(theirs, ours)))
            same.append(to_numpy(top1_agreement(theirs, ours)))
            here = {"decoding/aop": aop, "decoding/kl": kl[-1].mean()}
            targets = tokens[start + 1 : stop + 1]  # the last fed token predicts one that is not fed
            if len(targets):
                loss = [to_numpy(negative_log_likelihood(p[: len(targets)], like(targets, p))) for p in (ours, theirs)]
                rise.append(loss[0] - loss[1])
                here["decoding/delta_nll"] = rise[-1].mean()
            rows += [{"turn": stop, "metric": metric, "value": float(value)} for metric, value in here.items()]
        curve = [row["value"] for row in rows if row["metric"] == "decoding/aop"]
        values = {
            "decoding/kl_mean": np.concatenate(kl).mean(),
            "decoding/kl_first": kl[0].mean(),
            "decoding/kl_last": kl[-1].mean(),
            "decoding/aop_mean": np.mean(curve),
            "decoding/aop_first": curve[0],
            "decoding/aop_last": curve[-1],
            "decoding/top1": np.concatenate(same).mean(),
            "decoding/evictions": evictions,
            "decoding/most_tokens": most_held,
            "decoding/resident_mb": most_bytes / 1e6,
            "decoding/full_mb": sum(x.nbytes for x in (*whole.keys, *whole.values)) / 1e6,
            "decoding/tok_s": self.tokens / seconds,
            "decoding/full_tok_s": self.tokens / full_seconds,
        }
        if rise:
            values["decoding/delta_nll_mean"] = np.concatenate(rise).mean()
        if peak:
            values["decoding/peak_mb"] = peak / 1e6
        return rows + [{"metric": metric, "value": float(value)} for metric, value in values.items()]

    def _on_the_full_cache(self, context: Context) -> tuple[Extension, Contents]:
        """What feeding the tokens to the full cache gives, and what it holds then."""
        cache = context.full_cache()
        return context.backend.extend(cache, context.continuation[: self.tokens]), context.backend.contents(cache)

    def _timed(self, context: Context) -> float:
        """Seconds that the same steps take on the full cache."""
        backend, cache = context.backend, context.full_cache()
        backend.synchronize()
        start = time.perf_counter()
        for token in context.continuation[: self.tokens]:
            backend.synchronize(backend.extend(cache, np.array([token])).logits)
        return time.perf_counter() - start

    def _perturbation(
        self, context: Context, fed: Extension, whole: Contents, held: Contents, prompt: int, start: int
    ) -> float:
        """AOP of a stretch's first tokens over what a cache holds before it, with the full cache's queries."""
        scaling, found = context.backend.scaling, []
        for layer, (q, k, v) in enumerate(zip(fed.queries, whole.keys, whole.values, strict=True)):
            q, seen = q[:, start : start + self.positions], prompt + start
            theirs = attention_output(q, k[:, :seen], v[:, :seen], scaling)
            ours = held.attended(layer, q, scaling)
            found.append(to_numpy(attention_output_perturbation(ours, theirs)))
        return float(np.mean(found))
