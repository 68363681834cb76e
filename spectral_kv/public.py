"""What a user of transformers calls: see `spectral_kv`."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_kv import names
from spectral_kv.calibration import QueryStatistics, observe
from spectral_kv.codec.bases import Bases
from spectral_kv.compressor import Compressor, foresees, repeats
from spectral_kv.measured_files import STATISTICS, bases_of, beside
from spectral_kv.scorers.base import Scorer
from spectral_kv.selection import Budget, whole
from spectral_kv.storage.base import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spectral_kv.at_rest.storage import SpectralAtRest
    from spectral_kv.backends.torch_generation import GenerationCache

DECODING = ("rescore", "append")


def cache(
    model: "PreTrainedModel",
    method: str | Scorer | None = "wavelet",
    budget: int | Budget = 512,
    storage: str | Storage = "dense",
    every: int | None = None,
    decode: str = "rescore",
    statistics: QueryStatistics | str | Path | None = None,
) -> "GenerationCache":
    """A cache for `model.generate(..., past_key_values=cache)` that keeps to a budget.

    Prompts are compressed layer by layer while they run; the model attends by SDPA from now on, and shows the cache its
    queries.

    Parameters
    ----------
    model : PreTrainedModel
        All its layers attend to all tokens. It is used where and in the dtype that it is.
    method : str or Scorer
        One of `METHODS`. Oracles can't be used: they read what is not generated yet.
    budget : int or Budget
        Tokens that every layer and KV head keeps, the first 4 and the last 64 among them as in the pipeline; a budget
        that can't hold them, of 68 tokens or fewer, has an eighth of it for the last, and an eighth, at most 4, for the
        first. A `Budget` states them itself.
    storage : str or Storage
        One of `STORAGES`. `spectral`, its like and `pair_bits` keep every token and want `method="full"`; their
        bases are looked for in the model's folder, and their ratio is that of the tokens in codes.
    every : int, optional
        While decoding, bring the cache back to its budget whenever it is so many tokens over it. By default what is
        generated is kept until the next prompt; with `decode="append"` the default is 1.
    decode : str
        How tokens are evicted once there are more than the budget. `rescore`: all that are held are scored again, with
        the queries of the last ones. `append`: a token is scored once, at the first eviction after it left the recent
        window. That puts it in a place among those that left before it, which keep theirs, and those in the last places
        are dropped for good.
    statistics : QueryStatistics or path, optional
        For `tri` and `wavelet_tri`: what `calibrate` measured. By default it is looked for in the model's folder.

    Raises
    ------
    ValueError
        If the model, or one of the others, is not suitable.
    """
    from spectral_kv.backends.torch import ATTENTION, TorchBackend
    from spectral_kv.backends.torch_generation import GenerationCache

    scorer, storage = names.method(method), names.storage(storage)
    if foresees(scorer):
        raise ValueError(f"method={method} is an oracle, which reads what is not generated yet: choose another method")
    if getattr(storage, "at_rest", False):
        raise ValueError(
            f"{type(storage).__name__} is for caches that nobody attends to: choose storage=spectral, and give it to "
            "cache.save(path, codec=...)"
        )
    if getattr(storage, "keeps_all", False) and scorer is not None:
        raise ValueError(f"{type(storage).__name__} keeps every token, and {method} evicts: choose method=full")
    if repeats(scorer):
        raise ValueError(
            f"method={method} has a finished prompt repeated, and a prompt is compressed layer by layer while it runs: "
            "choose another method"
        )
    if every is not None and (not whole(every) or every < 1):
        raise ValueError(f"every={every!r} must be a whole number, at least 1, or unset to keep what is generated")
    if decode not in DECODING:
        raise ValueError(f"decode={decode} is not known: choose {' or '.join(DECODING)}")
    if not isinstance(budget, Budget):
        if not whole(budget) or budget < 1:
            raise ValueError(f"budget={budget!r} must be a whole number of tokens, at least 1, or a spectral_kv.Budget")
        budget = Budget(budget) if budget > 68 else Budget(budget, sinks=min(4, budget // 8), recent=budget // 8)
    if budget.selection != "per_layer_perhead":
        raise ValueError(
            f"selection={budget.selection} needs all layers at once, and a prompt is compressed layer by layer: "
            "set selection=per_layer_perhead"
        )
    if budget.allocation != "uniform":
        raise ValueError(
            f"allocation={budget.allocation} shares out what is chosen when the whole prompt has run, and a prompt is "
            "compressed layer by layer: set allocation=uniform"
        )
    if decode == "append":
        every = 1 if every is None else every
        window = getattr(scorer, "window", None) or 0
        if window > budget.recent and getattr(scorer, "recent_share", None) is None:
            raise ValueError(
                f"decode=append scores a token when it leaves the {budget.recent} recent ones, and {scorer} wants the "
                f"queries of the last {window}: give a budget with recent={window}, or a smaller window"
            )
    before = model.config._attn_implementation
    if before != ATTENTION:
        model.set_attn_implementation("sdpa")
    try:
        backend = TorchBackend.wrap(model)
        calibrated = scorer is not None and "calibration" in scorer.reads
        found = _statistics(backend, model, statistics) if calibrated else None
        held_in = _with_bases(backend, model, storage) if hasattr(storage, "bases") else storage
    except BaseException:
        model.set_attn_implementation(before)
        raise
    model.set_attn_implementation(ATTENTION)
    return GenerationCache(Compressor(backend, scorer, budget, held_in, found), every, decode, storage)


def _with_bases(backend: Any, model: "PreTrainedModel", storage: Any) -> Any:
    """A storage with the bases of the model, checked, and bits instead of a ratio: nobody knows how long it becomes."""
    path = bases_of(model, storage.bases)
    found = replace(storage, bases=path, ratio=None, bits=storage.bits or 16 / storage.ratio)
    found.read((backend.shape.layers, backend.shape.kv_heads, backend.shape.dim))
    return found


def _statistics(backend: Any, model: "PreTrainedModel", given: QueryStatistics | str | Path | None) -> QueryStatistics:
    shape = (backend.shape.layers, backend.shape.query_heads, backend.shape.dim // 2)
    if isinstance(given, QueryStatistics):
        return given.of_shape(shape, "what statistics= gives")
    path = given or beside(model, STATISTICS)
    if not Path(path).is_file():
        raise ValueError(
            f"{path} is not there: pass statistics=spectral_kv.calibrate(model, windows), or choose a method that "
            "needs no calibration"
        )
    return QueryStatistics.load(path, shape)


def calibrate(model: "PreTrainedModel", windows: Iterable[np.ndarray]) -> QueryStatistics:
    """Query statistics of a model over token ids `[tokens]` of several texts, for `tri` and `wavelet_tri`.

    Saved as query_statistics.safetensors in the model's folder, they are found from there.

    Raises
    ------
    ValueError
        If there is no window, or one that is no sequence of token ids.
    """
    from spectral_kv.backends.torch import TorchBackend

    texts = [np.asarray(window) for window in windows]
    if not texts or any(text.ndim != 1 or len(text) == 0 for text in texts):
        raise ValueError(
            "statistics are measured on texts, and windows has none, or one that is no sequence of token ids: "
            "give [[ids of a text], ...]"
        )
    return observe(TorchBackend.wrap(model), texts).statistics()


def bases(model: "PreTrainedModel", windows: Iterable[np.ndarray], layers: int = 4) -> Bases:
    """Bases of a model for `storage="spectral"`, measured over token ids `[tokens]` of several texts.

    Saved as bases.safetensors in the model's folder, they are found from there. Wanted are 100,000 tokens of many
    kinds, in texts of some thousands; longer texts are cut to the shortest. How much an error in a cache costs is
    measured by the last eighth of a text, at most 512 tokens.

    Parameters
    ----------
    layers : int
        At most so many are coded together.
    """
    from spectral_kv.backends.torch import TorchBackend
    from spectral_kv.backends.torch_bases import measure

    texts = [np.asarray(window) for window in windows]
    tokens = min(map(len, texts), default=0)
    if tokens < 64:
        raise ValueError(f"bases are measured on texts of some thousand tokens, and the shortest has {tokens}")
    following = min(512, tokens // 8)
    return measure(TorchBackend.wrap(model), texts, tokens - following, layers, following)


def load(
    path: str | Path,
    model: "PreTrainedModel",
    tokens: Any = None,
    method: str | Scorer | None = None,
    storage: str | Storage | None = None,
    codec: "SpectralAtRest | None" = None,
) -> "GenerationCache":
    """A cache that `cache.save(path)` wrote, with all its settings; it continues bit for bit, evictions too.

    Parameters
    ----------
    path : path
    model : PreTrainedModel
        The one that the cache is of.
    tokens : array of int, [batch, tokens], optional
        Refuse the cache if these are not the tokens that it was saved with.
    method : str or Scorer, optional
        Another one from now on, as `full` to evict nothing more. Needed where it was saved with a scorer that has no
        name in `METHODS` or other settings than those of the name.
    storage : str or Storage, optional
        The one that it was saved with, needed where that has no name in `STORAGES` or other settings.
    codec : SpectralAtRest, optional
        The one that wrote it, needed where its bases do not lie in the model's folder. What it wrote continues as a
        dense cache, not bit for bit.

    Raises
    ------
    ValueError
        If the file is damaged, holds something else, or the cache of another model, version or text.
    """
    from spectral_kv.backends import torch_cache_at_rest, torch_cache_file

    header, held, statistics = torch_cache_file.read(path, model, tokens)
    saved = header["settings"]
    loaded = cache(
        model,
        torch_cache_file.resolved(path, "scorers", saved["method"], method),
        Budget(**saved["budget"]),
        torch_cache_file.resolved(path, "storage", saved["storage"], storage),
        saved["every"],
        saved["decode"],
        statistics,
    )
    if "at_rest" in header:
        held = torch_cache_at_rest.awake(header["at_rest"], held, loaded.compressor.backend, codec)
    if header["bases"] != torch_cache_file.bases_of(loaded.compressor):
        raise ValueError(f"{path} was written with other bases than those of this storage: bring those back")
    loaded.restore(held, header["position"], header["seen"])
    return loaded
