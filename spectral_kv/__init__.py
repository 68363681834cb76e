"""KV-cache compression that reads keys as signals.

    import spectral_kv
    cache = spectral_kv.cache(model, "wavelet", budget=512, storage="turboquant_4bit")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=200)

`cache` makes a cache for a model of transformers, `load` reads a saved one, `calibrate` measures what `tri` and
`wavelet_tri` need, `bases` what the storage `spectral` needs. `reference_model` is the folder of a small model that
comes along. `METHODS` and `STORAGES` are the names that `cache` knows; `Budget` says more of a budget than its number
of tokens.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectral_kv.measured_files import reference_model
    from spectral_kv.names import METHODS, STORAGES
    from spectral_kv.public import bases, cache, calibrate, load
    from spectral_kv.selection import Budget

__version__ = "0.1.0"

_HOMES = {
    "METHODS": "names",
    "STORAGES": "names",
    "Budget": "selection",
    "bases": "public",
    "cache": "public",
    "calibrate": "public",
    "load": "public",
    "reference_model": "measured_files",
}

__all__ = ["METHODS", "STORAGES", "Budget", "bases", "cache", "calibrate", "load", "reference_model"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
