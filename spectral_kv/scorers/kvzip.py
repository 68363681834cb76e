"""KVzip: keep what the model looks at when it repeats its prompt (Kim et al., arXiv 2505.23416)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spectral_kv.attention import attention_logits
from spectral_kv.scorers.base import LayerView, Repetition
from spectral_kv.xp import Array, blocks, float32, like, namespace

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"


def best_of(scores: Array, kernel: int) -> Array:
    """Largest of `kernel` neighbours of `[heads, tokens]`, of fewer at the ends."""
    xp, found, count = namespace(scores), scores, scores.shape[1]
    for away in range(1, min(kernel // 2, count - 1) + 1):
        after = xp.concat([scores[:, away:], scores[:, count - away :]], axis=1)
        before = xp.concat([scores[:, :away], scores[:, : count - away]], axis=1)
        found = xp.maximum(found, xp.maximum(before, after))
    return found


@dataclass(frozen=True)
class KVzip:
    """Largest weight that a token gets, from any query head of the group, while the prompt is fed again.

    After the prompt an instruction is fed and a part of the prompt again, part by part. The softmax is over sinks, the
    part itself and what is fed of it; all fed tokens vote, the instruction's too, as in the authors' code.

    Parameters
    ----------
    chunk : int
        Tokens of a part.
    sinks : int
        First tokens of the prompt, which stay in the softmax of later parts. They score 1 and are not fed again: what
        begins a prompt, a BOS token or the opening of a chat, would tell the model that another text begins.
    lead : int
        Last tokens of the part before, which end the instruction of later parts.
    ending : str
        Text between the instruction and the part; of a chat model what ends a user's turn and begins its own.
    kernel : int
        Odd; a token scores as much as the best of so many neighbours, sinks apart. 1 is the paper. A model that repeats
        a number with a mistake looks past some of its digits, and the rest of it is kept in vain.
    """

    chunk: int = 2048
    sinks: int = 4
    lead: int = 8
    ending: str = "\n"
    kernel: int = 1

    reads: ClassVar[tuple[str, ...]] = ("keys", "repetition")

    def __post_init__(self):
        if self.chunk < 1 or self.sinks < 0 or self.lead < 0:
            raise ValueError(
                f"chunk={self.chunk} must be at least 1, sinks={self.sinks} and lead={self.lead} not negative"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be an odd number, 1 for every token on its own")

    def repetitions(
        self, tokens: np.ndarray, encode: Callable[[str], np.ndarray]
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Every part of a prompt `[tokens]`, and the tokens that are fed after the prompt to have it repeated."""
        for start in range(0, len(tokens), self.chunk):
            span = slice(start, min(start + self.chunk, len(tokens)))
            asked = [encode(LATER), tokens[max(start - self.lead, 0) : start]] if start else [encode(FIRST)]
            again = tokens[max(start, self.sinks) : span.stop]
            yield span, np.concatenate([*asked, encode(self.ending), again]).astype(np.int64)

    def repeated(self, seen: Repetition) -> Array:
        """Largest weights `[kv_heads, span]` of the tokens of a part, for `score`."""
        xp = namespace(seen.keys)
        kv_heads, (query_heads, fed, _) = len(seen.keys), seen.queries.shape
        group, first = query_heads // kv_heads, min(self.sinks, seen.span.start)
        keys = xp.concat([seen.keys[:, :first], seen.keys[:, seen.span], seen.fed_keys], axis=1)
        before, length = keys.shape[1] - fed, seen.span.stop - seen.span.start
        weigh, found = self._weights(seen), []
        for head in range(kv_heads):
            most = like(np.zeros((1, length), dtype=np.float32), float32(seen.keys[:1, :1, 0]))
            for own in range(head * group, (head + 1) * group):
                for some in blocks(fed, 12 * fed * keys.shape[1], seen.keys):
                    visible = keys[head : head + 1, : before + some.stop]
                    logits = attention_logits(seen.queries[own : own + 1, some], visible, seen.scaling, causal=True)
                    shifted = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
                    scale = weigh(some) / xp.sum(shifted, axis=-1, keepdims=True)
                    largest = xp.max(shifted[..., first : first + length] * scale, axis=1)
                    most = xp.maximum(most, self._of_head(seen, own, largest))
            found.append(most)
        scores = xp.concat(found, axis=0)
        if seen.span.start < self.sinks:  # they are kept whatever is looked at
            inside = like(np.arange(seen.span.start, seen.span.stop), scores) < self.sinks
            scores = xp.where(inside, xp.maximum(scores, xp.ones_like(scores)), scores)
        return scores

    def _weights(self, seen: Repetition) -> Callable[[slice], Array | float]:
        """A factor of the votes of some fed tokens."""
        return lambda some: 1.0

    def _of_head(self, seen: Repetition, head: int, largest: Array) -> Array:
        """A query head's verdict `[1, span]` from its largest weights."""
        return largest

    def score(self, layer: LayerView) -> Array:
        if layer.gathered is None:
            raise ValueError(f"{type(self).__name__} scores a prompt while it is repeated, and nothing was repeated")
        scores, first = layer.gathered, min(self.sinks, layer.tokens)
        return namespace(scores).concat([scores[:, :first], best_of(scores[:, first:], self.kernel)], axis=1)
