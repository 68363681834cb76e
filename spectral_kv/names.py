"""Methods and storages by name: the names of the configuration groups, with the same settings."""

from importlib import import_module
from typing import Any

METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "full": None,
    "compactor": ("compactor.Compactor", {}),
    "defensive": ("defensive.Defensive", {}),
    "expected_attention": ("expected_attention.ExpectedAttention", {}),
    "fourier": ("fourier.Fourier", {}),
    "h2o": ("h2o.H2O", {}),
    "keydiff": ("keydiff.KeyDiff", {}),
    "knorm": ("knorm.Knorm", {}),
    "kvzip": ("kvzip.KVzip", {}),
    "kvzip_plus": ("kvzip_plus.KVzipPlus", {}),
    "observed_attention": ("observed_attention.ObservedAttention", {}),
    "oracle_mass": ("oracle_mass.OracleMass", {}),
    "oracle_value": ("oracle_value.OracleValue", {}),
    "random": ("random.Random", {}),
    "ridge_kvzap": ("ridge_kvzap.RidgeKVzap", {}),
    "snapkv": ("snapkv.SnapKV", {}),
    "streaming": ("streaming.Streaming", {}),
    "tova": ("tova.Tova", {}),
    "tri": ("tri.TriAttention", {}),
    "turboquant": None,
    "wavelet": ("wavelet.Wavelet", {}),
    "wavelet_fourier": ("wavelet_fourier.WaveletFourier", {}),
    "wavelet_tri": ("wavelet_tri.WaveletTri", {}),
}

STORAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense.Dense", {}),
    "hqq_4bit": ("quantized_cache.QuantizedCacheStorage", {"library": "hqq", "bits": 4}),
    "pair_bits": ("spectral.SpectralStorage", {"ratio": 8.0, "transform": False}),
    "quanto_2bit": ("quantized_cache.QuantizedCacheStorage", {"library": "quanto", "bits": 2}),
    "quanto_4bit": ("quantized_cache.QuantizedCacheStorage", {"library": "quanto", "bits": 4}),
    "spectral": ("spectral.SpectralStorage", {"ratio": 8.0}),
    "spectral_10x": ("spectral.SpectralStorage", {"ratio": 10.0}),
    "spectral_14x": ("spectral.SpectralStorage", {"ratio": 14.0}),
    "turboquant_2bit": ("turboquant.TurboQuantStorage", {"key_bits": 2, "value_bits": 2}),
    "turboquant_3bit": ("turboquant.TurboQuantStorage", {"key_bits": 3, "value_bits": 3}),
    "turboquant_4bit": ("turboquant.TurboQuantStorage", {"key_bits": 4, "value_bits": 4}),
}


def _made(group: str, entry: tuple[str, dict[str, Any]]) -> Any:
    (module, _, name), settings = entry[0].partition("."), entry[1]
    return getattr(import_module(f"spectral_kv.{group}.{module}"), name)(**settings)


def method(name: Any) -> Any:
    """The scorer of a name, None where every token is kept; a scorer is returned as it is."""
    if not isinstance(name, str):
        if name is not None and (isinstance(name, type) or not hasattr(name, "score")):
            raise ValueError(
                f"method={name!r} is no scorer: give one of {', '.join(METHODS)}, or an object as Wavelet()"
            )
        return name
    if name not in METHODS:
        raise ValueError(f"method={name} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name] and _made("scorers", METHODS[name])


def storage(name: Any) -> Any:
    """The storage of a name; a storage is returned as it is."""
    if not isinstance(name, str):
        if isinstance(name, type) or not (hasattr(name, "store") or hasattr(name, "store_together")):
            raise ValueError(
                f"storage={name!r} is no storage: give one of {', '.join(STORAGES)}, or an object as Dense()"
            )
        return name
    if name not in STORAGES:
        raise ValueError(f"storage={name} is not known: choose one of {', '.join(STORAGES)}")
    return _made("storage", STORAGES[name])


def known_as(thing: Any, group: str) -> str | None:
    """The name of a scorer (`group` is `scorers`) or a storage (`storage`) with the settings of that name, or None."""
    place = f"{type(thing).__module__}.{type(thing).__name__}"
    for name, entry in (METHODS if group == "scorers" else STORAGES).items():
        if entry is None:
            if thing is None:
                return name
        elif place == f"spectral_kv.{group}.{entry[0]}" and thing == _made(group, entry):
            return name
    return None
