"""A model of lm-evaluation-harness that answers from a compressed cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM, eval_logger
from tqdm import tqdm

import spectral_kv
from spectral_kv.backends.torch_generation import GenerationCache
from spectral_kv.calibration import QueryStatistics

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


@dataclass
class Evicted:
    """What was asked of the caches of one kind of request, summed over contexts."""

    contexts: int = 0
    tokens: int = 0
    held: int = 0
    nbytes: int = 0

    def add(self, lengths: list[int], cache: GenerationCache) -> None:
        """Contexts of these numbers of tokens, in a cache that has just read them."""
        self.contexts += len(lengths)
        self.tokens += sum(lengths)
        self.held += sum(sequence.held for sequence in cache.layers[0].sequences)
        self.nbytes += cache.nbytes

    def summary(self) -> dict[str, float]:
        """Totals, and bytes of a context's cache."""
        return {
            "contexts": self.contexts,
            "context_tokens": self.tokens,
            "held_tokens": self.held,
            "evicted_tokens": self.tokens - self.held,
            "cache_bytes_a_context": round(self.nbytes / max(self.contexts, 1)),
        }


@dataclass
class Setting:
    """How caches are made: arguments of `spectral_kv.cache`, or with a `ratio` of the context instead of a budget."""

    method: str
    storage: str
    budget: int | None
    ratio: float | None
    every: int | None
    decode: str
    statistics: QueryStatistics | Path | None
    evicted: dict[str, Evicted] = field(default_factory=dict)

    def __post_init__(self):
        if (self.budget is None) == (self.ratio is None):
            raise ValueError(f"give budget={self.budget} or ratio={self.ratio}: one of them")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be above 0 and at most 1")
        if self.budget is not None and (not isinstance(self.budget, int) or self.budget < 1):
            raise ValueError(f"budget={self.budget} must be a number of tokens, at least 1")

    def tokens(self, context: int) -> int:
        """Kept tokens of a context."""
        return self.budget if self.ratio is None else max(1, round(self.ratio * context))


@register_model("spectral_kv")
class SpectralKV(HFLM):
    """`hf` with a compressed cache between a context and what is asked of it.

    Of every context all tokens but the last are run and compressed; the last one and the continuation, or what is
    generated, read the compressed cache alone. With the last token in the prompt the first token of an answer, often
    all there is of it, would be predicted from the whole context whatever is evicted.

    Contexts that are scored are run one by one, and once for all continuations they share; a batch of contexts that are
    continued is compressed sequence by sequence, without its padding.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
    method, storage, every, decode, statistics
        As of `spectral_kv.cache`; `statistics` is a file.
    budget : int, optional
        Kept tokens; 512 if there is no `ratio` either.
    ratio : float, optional
        Kept share of every context's tokens instead; in a batch that is generated from, of the longest one's.
    settings
        Those of `hf`.
    """

    def __init__(
        self,
        pretrained: Any,
        method: str = "wavelet_tri",
        budget: int | None = None,
        storage: str = "dense",
        every: int | None = None,
        decode: str = "rescore",
        statistics: str | None = None,
        ratio: float | None = None,
        **settings: Any,
    ):
        if budget is None and ratio is None:
            budget = 512
        self.setting = Setting(
            method, storage, budget, ratio, every, decode, Path(statistics) if statistics else None
        )  # fmt: skip
        super().__init__(pretrained, **settings)
        if self.backend != "causal":
            raise ValueError(f"a {self.backend} model has no cache of a context: give a causal one")
        self._cache(1)  # what can't be used is refused before anything runs

    def _cache(self, context: int) -> GenerationCache:
        s = self.setting
        return spectral_kv.cache(
            self.model, s.method, s.tokens(context), s.storage, every=s.every, decode=s.decode, statistics=s.statistics
        )

    def _read(self, kind: str, ids: torch.Tensor, mask: torch.Tensor) -> GenerationCache:
        """A cache of all tokens but the last of contexts `[batch, tokens]`, compressed."""
        cache, lengths = self._cache(int(mask[:, :-1].sum(dim=-1).max())), mask[:, :-1].sum(dim=-1).tolist()
        if ids.shape[1] > 1:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            with torch.no_grad():
                self.model(
                    ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache,
                    logits_to_keep=1,
                )  # fmt: skip
        self.setting.evicted.setdefault(kind, Evicted()).add(lengths, cache)
        return cache

    def _contexts(self, requests: list[Request]) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts, cut on the left to what the model reads, and the numbers of the requests that share each."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            shared.setdefault(tuple(context[-room:] if len(context) > room else context), []).append(number)
        yield from ((list(context), numbers) for context, numbers in shared.items())

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, numbers in tqdm(list(self._contexts(requests)), "spectral_kv", disable=disable_tqdm):
            ids = torch.tensor([context], device=self.device)
            cache = self._read("loglikelihood", ids, torch.ones_like(ids))
            continuations = [requests[number][2] for number in numbers]
            # padding on the right: what follows a token does not change it
            longest = max(map(len, continuations))
            fed = [context[-1:] + tokens[:-1] + [0] * (longest - len(tokens)) for tokens in continuations]
            cache.batch_repeat_interleave(len(numbers))
            logits = self.model(torch.tensor(fed, device=self.device), past_key_values=cache).logits
            for number, tokens, row in zip(numbers, continuations, logits, strict=True):
                row = torch.log_softmax(row[: len(tokens)], dim=-1, dtype=self.softmax_dtype)
                wanted = torch.tensor(tokens, device=self.device)
                score = row.gather(1, wanted[:, None]).sum()
                answers[number] = float(score), bool((row.argmax(dim=-1) == wanted).all())
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        self._log("loglikelihood")
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "a rolling log-likelihood scores texts without a context, so that nothing is cached before them: "
            "choose a task with contexts, or --model hf"
        )

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        mask = settings.get("attention_mask")
        mask = torch.ones_like(context) if mask is None else mask
        cache = self._read("generate_until", context, mask)
        cache.batch_repeat_interleave(max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1)))
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **settings)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = super().generate_until(requests, disable_tqdm)
        self._log("generate_until")
        return answers

    def _log(self, kind: str) -> None:
        if kind in self.setting.evicted:
            eval_logger.info("spectral_kv, %s: %s", kind, self.setting.evicted[kind].summary())

    def get_model_info(self) -> dict[str, Any]:
        """That of `hf`, how caches were made, and what was evicted."""
        s = self.setting
        made = {name: getattr(s, name) for name in ("method", "storage", "budget", "ratio", "every", "decode")}
        counts = {kind: evicted.summary() for kind, evicted in s.evicted.items()}
        return super().get_model_info() | {"spectral_kv": made | counts}
