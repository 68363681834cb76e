"""Which tokens of white noise a spectral scorer chooses: the share at odd places, half if it has no parity of its own.

    python benchmarks/white_noise.py
    python benchmarks/white_noise.py --draws 40

A draw is a key sequence [1, 4096, 16] of independent normal values; the 444 highest of tokens 4 to 4031 are chosen, as
a budget of 512 does. Deviations alone: no recency, no norm, no term of RoPE. `wavelet_tri` is its spectral term.
"""

import argparse

import numpy as np
import torch

from spectral_kv.scorers.fourier import Fourier
from spectral_kv.scorers.spectral import Spectral
from spectral_kv.scorers.wavelet import Wavelet
from spectral_kv.scorers.wavelet_fourier import WaveletFourier
from spectral_kv.scorers.wavelet_tri import WaveletTri

TOKENS, CHANNELS = 4096, 16
FIRST, RECENT, CHOSEN = 4, 64, 444


def odd_shares(scorer: Spectral, draws: int, seed: int) -> np.ndarray:
    """Share of chosen tokens at odd places, of every draw."""
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for _ in range(draws):
        noise = torch.randn(1, TOKENS, CHANNELS, generator=generator)
        chosen = scorer.spectral(noise)[0, FIRST:-RECENT].topk(CHOSEN).indices + FIRST
        shares.append((chosen % 2).float().mean().item())
    return np.array(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scorers = {
        "fourier": Fourier(),
        "wavelet": Wavelet(),
        "wavelet centred": Wavelet(centred=True),
        "wavelet stationary": Wavelet(transform="stationary"),
        "wavelet haar": Wavelet(wavelet="haar"),
        "wavelet_fourier": WaveletFourier(),
        "wavelet_fourier centred": WaveletFourier(centred=True),
        "wavelet_tri": WaveletTri(),
    }
    print(f"{'scorer':<26}{'odd share':>10}{'s.e.':>8}   {arguments.draws} draws")
    for name, scorer in scorers.items():
        shares = odd_shares(scorer, arguments.draws, arguments.seed)
        print(f"{name:<26}{shares.mean():>10.3f}{shares.std(ddof=1) / len(shares) ** 0.5:>8.4f}")


if __name__ == "__main__":
    main()
