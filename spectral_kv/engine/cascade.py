"""WaveletFourierKV of many layers at once on a GPU: wavelet bands in one pass over the keys, then a filter in each.

The pass leaves the coefficients of every band where the filter of a band, a short one with reflected ends as in
`banded`, reads them. Only the spectra of segments, which `alpha` is measured on, still take a Fourier transform.
"""

import torch

from spectral_kv.engine import scoring
from spectral_kv.engine.banded import Plan, fir, levels_of, wavelet_plan
from spectral_kv.rope import Rope
from spectral_kv.scorers.wavelet_fourier import SEGMENTS, WaveletFourier, nonstationarity

COPIES = 6  # float32 signals that a layer takes for a while


def plans(scorer: WaveletFourier, tokens: int) -> tuple[Plan, list[Plan]] | None:
    """Of the wavelet bands, and of the filter in each of them (or along all tokens), or None without one."""
    bands = wavelet_plan(scorer, tokens)
    if bands is None or scorer.signal != "unrotated_keys" or scorer.shuffle_seed is not None or scorer.centred:
        return None
    lengths = levels_of(scorer, tokens) if scorer.cascade else [tokens]
    filters = [fir(scorer.cutoff, scorer.taper, length) for length in lengths]
    return None if any(f is None for f in filters) else (bands, filters)


def segment_power(x: torch.Tensor) -> torch.Tensor:
    """As of `wavelet_fourier.segment_power`; the mean of a segment is its lowest bin, which is left out."""
    rows, tokens, dim = x.shape
    length = tokens // SEGMENTS
    spectrum = torch.fft.rfft(x[:, : SEGMENTS * length].reshape(rows, SEGMENTS, length, dim), dim=2)
    power = torch.view_as_real(spectrum).square_().sum((-1, -2))
    power[..., 0] = 0
    return power


def deviations(
    scorer: WaveletFourier, found: tuple[Plan, list[Plan]], keys: list[torch.Tensor], rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations and norms of keys, float32 `[layers * kv_heads, tokens]`, of rotated keys at positions from 0 on."""
    bands, filters = found
    tokens = keys[0].shape[1]
    energy, norms, filtered = scoring.energies(bands, keys, rope, keep=scorer.cascade)
    if scorer.cascade:
        left_over, start = torch.empty_like(energy), 0
        for each in filters:
            scoring.energies_of(each, filtered, start, left_over)
            start += each.energies
        del filtered
        fourier = scoring.at_tokens(bands, left_over, tokens)
    else:
        fourier, _ = scoring.deviations(filters[0], keys, rope)
    wavelet = scoring.at_tokens(bands, energy, tokens)
    if scorer.alpha is None:
        alpha = nonstationarity(segment_power(scoring.unrotated(keys, rope)))[:, None]
    else:
        alpha = scorer.alpha
    return alpha * wavelet + (1.0 - alpha) * fourier, norms
